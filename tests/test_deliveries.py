"""Which servers a run is delivered to, and when they or its own copy there speak against it."""

import json
from pathlib import Path

import pytest

from tests.conftest import composed
from tests.servers import ObjectStore
from wmtp.checkpoint.remote import S3Folder
from wmtp.deliveries import GoneOnElsewhere, check_servers, require_own_place
from wmtp.errors import InputError
from wmtp.provenance import identify

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.xdist_group("servers")]


def checkpoint(folder: Path, step: int, stage: str = "") -> None:
    """Something that looks like a checkpoint."""
    path = folder / stage / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


@pytest.fixture
def place(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Folder:
    """Where the run in `tmp_path/run` has its copy."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    return S3Folder(f"s3://{object_store.bucket}/prefix/run")


def test_a_place_of_another_run_is_refused(place: S3Folder, tmp_path: Path) -> None:
    """The control is the same run's."""
    folder = tmp_path / "run"
    config = composed("checkpoint=s3", f"checkpoint.remote=s3://{place.bucket}/prefix", "tracking=none")
    assert check_servers(config, folder) == []
    identify(folder, f"s3://{place.bucket}/prefix")
    place.put(folder / "run.json", "run.json")
    assert check_servers(config, folder) == []

    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds another run; name another folder \(hydra.run.dir\) or remote"):
        check_servers(config, folder)
    assert [key for key, _ in place.listed()] == ["run.json"], "what was written to see whether it can be is gone"


@pytest.mark.parametrize(
    ("here", "there", "is_behind"),
    [
        ({}, {}, False),
        ({"": 10}, {"": 10}, False),
        ({"": 20}, {"": 10}, False),
        ({"": 10}, {"": 20}, True),
        ({"pretrain": 10}, {"pretrain": 20}, True),
        ({"pretrain": 10}, {"pretrain": 10, "": 5}, True),
        ({"pretrain": 10, "": 5}, {"pretrain": 20}, False),
    ],
)
def test_a_folder_that_is_behind_its_copy_is_noticed(
    place: S3Folder, tmp_path: Path, here: dict[str, int], there: dict[str, int], is_behind: bool
) -> None:
    folder = tmp_path / "run"
    for stage, step in here.items():
        checkpoint(folder, step, stage)
    for stage, step in there.items():
        place.put_bytes(
            json.dumps({"folder": "x", "step": step}).encode(), f"{stage}/checkpoints/latest.json".lstrip("/")
        )
    if is_behind:
        with pytest.raises(GoneOnElsewhere, match=rf"go on from there with resume={place.url}"):
            require_own_place(place, folder, None)
    else:
        require_own_place(place, folder, None)
