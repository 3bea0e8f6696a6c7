"""Tests of the URI of an MLflow store: its default, and the removal of passwords."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from wmtp.errors import InputError
from wmtp.tracking.mlflow import MlflowTracker
from wmtp.tracking.mlflow.uri import TrackingUri, absolute_uri


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
