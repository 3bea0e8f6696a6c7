"""Tests of credentials: they are accepted only from the environment or `.env`."""

import os
from pathlib import Path

import pytest

from tests.conftest import Invoke
from wmtp.cli.env import load_environment

SECRET = "hunter2"


def test_env_file_adds_missing_variables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHON_DOTENV_DISABLED")
    (tmp_path / ".env").write_text("WMTP_TEST_A=from the file\nexport WMTP_TEST_B='also' # why\n")
    monkeypatch.setenv("WMTP_TEST_A", "from the environment")
    monkeypatch.setenv("WMTP_TEST_B", "")
    monkeypatch.delenv("WMTP_TEST_B")
    load_environment()
    assert (os.environ["WMTP_TEST_A"], os.environ["WMTP_TEST_B"]) == ("from the environment", "also")


def test_credentials_are_removed_from_the_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@host/path")
    load_environment()
    found = [os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")]
    assert found == ["https://host/path", "me", SECRET]


@pytest.mark.parametrize(
    "argument",
    [
        f"tracking.uri=https://me:{SECRET}@host",
        f"checkpoint.s3.endpoint_url='http://key:{SECRET}@host:9000'",
        f"+tags.where=s3://key:{SECRET}@bucket",
    ],
)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_password_in_an_argument_is_refused_and_not_printed(
    invoke: Invoke, tmp_path: Path, argument: str, sweep: list[str]
) -> None:
    outcome = invoke(argument, *sweep)
    assert outcome.code == 2 and "put users and passwords into the environment or .env" in outcome.err
    assert SECRET not in outcome.out + outcome.err
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_password_in_the_config_is_refused_and_not_printed(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An argument may refer to a variable, whose value is read when the config is checked."""
    monkeypatch.setenv("SOME_SERVER", f"https://me:{SECRET}@host")
    outcome = invoke("tracking=mlflow", "tracking.uri=${oc.env:SOME_SERVER}")
    assert outcome.code == 2 and "tracking.uri" in outcome.err
    assert SECRET not in outcome.out + outcome.err
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
