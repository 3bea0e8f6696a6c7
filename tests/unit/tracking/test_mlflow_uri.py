"""Tests of the URI of an MLflow store and of the other settings in the environment."""

import os
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from wmtp.errors import InputError
from wmtp.tracking.mlflow import MlflowTracker
from wmtp.tracking.mlflow.client import check_variables, configure_mlflow, create_store
from wmtp.tracking.mlflow.uri import TrackingUri, absolute_uri, check_database, resolve_experiment, uri_problem


def test_the_default_store_is_in_the_outputs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert absolute_uri(None, Path("/x/outputs/day/outputs/run")) == "sqlite:////x/outputs/day/outputs/mlflow.db"
    assert absolute_uri(None, Path("/x/sweep/run")) == "sqlite:////x/sweep/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///my.db", Path("/x")) == f"sqlite:///{Path.cwd()}/my.db"
    assert absolute_uri("https://host/", Path("/x")) == "https://host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere")
    assert absolute_uri(None, Path("/x")) == "https://elsewhere"
    assert absolute_uri("https://host", Path("/x")) == "https://host"


@pytest.mark.parametrize(
    ("uri", "expected_uri", "user", "password"),
    [
        ("https://me:pa%2Fss%40@host:5000/path", "https://host:5000/path", "me", "pa/ss@"),
        ("http://token@host", "http://host", "token", ""),
        ("https://host/path", "https://host/path", None, None),
        ("sqlite:////home/me@here/mlflow.db", "sqlite:////home/me@here/mlflow.db", None, None),
    ],
)
def test_user_and_password_are_removed_from_the_uri_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, uri: str, expected_uri: str, user: str | None, password: str | None
) -> None:
    """They move to variables. The test sets all variables first, so that pytest restores them at its end."""
    for name, value in (("URI", uri), ("USERNAME", ""), ("PASSWORD", "")):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    assert absolute_uri(None, Path("/x")) == expected_uri == os.environ["MLFLOW_TRACKING_URI"]
    credentials = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert credentials == (user or "", password or "")


@pytest.mark.parametrize("uri", ["https://me:s3cret/@host", "https://me:s3cret@host", "postgresql://me:s3cret@host/db"])
def test_a_uri_with_a_password_is_refused_without_printing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(TrackingUri).validate_python(uri)
    assert [error["msg"] for error in raised.value.errors()] == [
        "Value error, holds a user or a password; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, in the environment or in .env, instead"
    ]
    with pytest.raises(InputError, match="holds a user or a password") as refused:
        MlflowTracker(tmp_path, "run", {}, {}, uri=uri)
    assert "s3cret" not in str(refused.value) and not list(tmp_path.iterdir())
    if uri != "https://me:s3cret@host":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(InputError, match="MLFLOW_TRACKING_URI holds") as refused:
            MlflowTracker(tmp_path, "run", {}, {})
        assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "right_form"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("mlflow.example.org", "http://mlflow.example.org"),
        ("tracker:5000/path", "http://tracker:5000/path"),
        (" https://host\n", "https://host"),
        ("http//host:80", "http://host:80"),
        ("/data/my.db", "sqlite:////data/my.db"),
        ("./mlruns", "sqlite:///./mlruns/mlflow.db"),
        ("/data/mlruns/", "sqlite:////data/mlruns/mlflow.db"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("mlruns", "sqlite:///mlruns/mlflow.db"),
        ("sqlite://my.db", "sqlite:///my.db"),
        ("sqlite:my.db", "sqlite:///my.db"),
        ("sqlite:///", "sqlite:///mlflow.db"),
        ("sqlite:////", "sqlite:////mlflow.db"),
        ("http:host", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://host:99999", "http://HOST:PORT"),
        ("http://two words", "http://HOST:PORT"),
        ("ftp://host/path", "http://HOST:PORT"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_the_right_form(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, right_form: str
) -> None:
    """Both in the config and in the environment. The right form itself is accepted."""
    with pytest.raises(ValidationError, match=f"write {re.escape(right_form)}"):
        TypeAdapter(TrackingUri).validate_python(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI=.*write {re.escape(right_form)}"):
        MlflowTracker(tmp_path, "run", {}, {})
    assert not list(tmp_path.iterdir())
    if "HOST" not in right_form:
        assert uri_problem(right_form) is None


@pytest.mark.parametrize(
    "uri",
    ["http://[::1]:5000", "HTTPS://host/path", "sqlite:///a b.db?timeout=5", "postgresql://host/db",
     "mysql+pymysql://host/db", "databricks", "databricks://profile"],
)  # fmt: skip
def test_every_uri_of_mlflow_is_accepted(uri: str) -> None:
    assert uri_problem(uri) is None


@pytest.mark.slow
def test_an_sqlite_file_that_cannot_store_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not exist yet, and the file of a store are accepted."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "outputs" / "run"
    database = run.parent / "mlflow.db"
    check_database(None, run)
    assert not database.parent.exists()
    database.parent.mkdir()
    create_store(database)
    check_database(None, run)
    database.write_text("text of another program")
    with pytest.raises(
        InputError, match=r"mlflow\.db: is not an SQLite database; choose another file with tracking\.uri="
    ):
        check_database(None, run)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        check_database(f"sqlite:///{tmp_path}/pipe", run)
    for uri, problem in (("sqlite:////proc/x.db", "cannot be written"), (f"sqlite:///{database}/x.db", "not a folder")):
        with pytest.raises(InputError, match=problem):
            check_database(uri, run)


def test_the_name_of_the_experiment_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert resolve_experiment(None) == "wmtp"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    assert resolve_experiment(None) == "from the environment" and resolve_experiment("typed") == "typed"


def test_a_variable_that_is_not_a_number_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.5")
    check_variables()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "abc")
    with pytest.raises(InputError, match="MLFLOW_HTTP_REQUEST_TIMEOUT='abc': must be an integer"):
        check_variables()


def test_no_home_directory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is `Path.home`, which mlflow calls when it is imported: it fails without the setting."""

    def fail(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setenv("HOME", "restored at the end of the test")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", fail)
    with pytest.raises(RuntimeError, match="home directory"):
        Path.home()
    configure_mlflow()
    assert Path.home() == Path("/nonexistent")
