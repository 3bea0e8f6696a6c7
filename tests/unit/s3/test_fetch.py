"""Tests of downloading a run from S3."""

import fcntl
import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.proxy import FaultyProxy
from tests.support.runs_in_s3 import RunInS3, step
from tests.support.servers import ObjectStore
from wmtp.checkpoint.manifest import find_damage
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.errors import InputError
from wmtp.runtime.run_dir import LOCK
from wmtp.s3.client import StoreUnreachable
from wmtp.s3.connection import no_progress
from wmtp.s3.fetch import fetch_run, find_run, local_folder
from wmtp.s3.layout import is_uploaded
from wmtp.s3.options import S3Options

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("s3"),
    pytest.mark.usefixtures("s3_credentials"),
]
MEGABYTE = 250_000


@pytest.fixture
def run(object_store: ObjectStore, tmp_path: Path) -> RunInS3:
    """Return a run with stage 1 and three checkpoints, the first of which is the best."""
    run = RunInS3(tmp_path / "run", f"s3://{object_store.bucket}/runs/2026-11-21/one")
    for number in (1, 2):
        run.save(number, stage="pretrain", best=1.0 if number == 1 else None)
    (run.folder / "pretrain" / "result.json").write_text(json.dumps({"saved": f"pretrain/checkpoints/{step(1)}"}))
    for number in (1, 2, 3):
        run.save(number, best=0.5 if number == 1 else None)
    (run.folder / "mlflow.json").write_text("{}")
    run.upload_all()
    return run


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flip_bit(run: RunInS3, key: str) -> None:
    content = bytearray(run.remote.get(key) or b"")
    content[len(content) // 2] ^= 1
    run.remote.put_bytes(bytes(content), key)


def options(proxy: FaultyProxy) -> S3Options:
    return S3Options(endpoint_url=proxy.url)


def test_a_run_is_downloaded_unchanged(run: RunInS3, tmp_path: Path) -> None:
    local = fetch_run(run.url, tmp_path / "local")
    neither_newest_nor_best = f"checkpoints/{step(2)}/"
    expected = {
        key: content for key, content in read_files(run.folder).items() if not key.startswith(neither_newest_nor_best)
    }
    assert read_files(local) == expected and len(expected) > 20
    store = CheckpointStore(local)
    assert store.latest().name == step(3) and (store.best() or local).name == step(1)
    assert load(store.latest()).state == {"step": 3}
    assert all(is_uploaded(local / "checkpoints" / step(number), run.url) for number in (1, 3))


def test_a_second_fetch_downloads_no_checkpoint(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    fetch_run(run.url, tmp_path / "local")
    before = read_files(tmp_path / "local")
    fetch_run(run.url, tmp_path / "local", options(proxy))
    assert read_files(tmp_path / "local") == before
    assert proxy.requests["GET"] < 20


def test_a_second_fetch_adds_new_checkpoints(run: RunInS3, tmp_path: Path) -> None:
    fetch_run(run.url, tmp_path / "local")
    run.save(4, best=0.4)
    run.upload_all()
    fetch_run(run.url, tmp_path / "local")
    store = CheckpointStore(tmp_path / "local")
    assert store.latest().name == step(4) and (store.best() or run.folder).name == step(4)
    assert (tmp_path / "local" / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def test_local_copy_with_later_checkpoint_stays_unchanged(
    run: RunInS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = fetch_run(run.url, tmp_path / "local")
    RunInS3(copy, run.url).save(9)
    before = read_files(copy)
    fetch_run(run.url, copy)
    assert read_files(copy) == before and "has a later checkpoint than" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_previous_checkpoint_replaces_a_damaged_one(
    run: RunInS3, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip_bit(run, f"checkpoints/{step(3)}/{name}")
    local = fetch_run(run.url, tmp_path / "local")
    assert CheckpointStore(local).latest().name == step(2) and find_damage(local / "checkpoints" / step(2)) is None
    assert f"checkpoints/{step(3)} is incomplete (" in caplog.text
    assert not list((local / "checkpoints").glob(".fetching-*"))
    assert json.loads((local / "checkpoints" / "latest.json").read_text())["folder"] == step(2)


def test_incomplete_checkpoint_is_not_used(run: RunInS3, tmp_path: Path) -> None:
    run.remote.delete([f"checkpoints/{step(3)}/model.safetensors", f"checkpoints/{step(2)}/manifest.json"])
    local = fetch_run(run.url, tmp_path / "local")
    assert CheckpointStore(local).latest().name == step(1)
    run.remote.delete([key for key, _ in run.remote.list_objects() if key.endswith("/manifest.json")])
    with pytest.raises(InputError, match="has no complete checkpoint there"):
        fetch_run(run.url, tmp_path / "elsewhere")


def test_control_plain_download_accepts_damaged_content(run: RunInS3, tmp_path: Path) -> None:
    key = f"checkpoints/{step(3)}/model.safetensors"
    flip_bit(run, key)
    run.remote.client.download_file(run.remote.bucket, run.remote.prefix + key, str(tmp_path / "model"))
    assert (tmp_path / "model").read_bytes() != (run.folder / key).read_bytes()


def test_file_with_flipped_byte_is_downloaded_again(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.flip(1, ("GET",))
    local = fetch_run(run.url, tmp_path / "local", S3Options(endpoint_url=proxy.url, checksums="when_required"))
    assert proxy.done["flip"] == 1 and CheckpointStore(local).latest().name == step(3)


def test_stage1_result_without_its_checkpoint_is_not_downloaded(run: RunInS3, tmp_path: Path) -> None:
    flip_bit(run, f"pretrain/checkpoints/{step(1)}/model.safetensors")
    local = fetch_run(run.url, tmp_path / "local")
    assert not (local / "pretrain" / "result.json").exists()
    assert CheckpointStore(local / "pretrain").latest().name == step(2)


def test_first_request_survives_errors(run: RunInS3, proxy: FaultyProxy) -> None:
    """The S3 client alone would fail after two attempts."""
    options = S3Options(endpoint_url=proxy.url)
    proxy.answer(503, 4)
    assert find_run(run.url.rpartition("/")[0], options) == run.url
    assert proxy.done["answer"] == 4


def test_an_interrupted_download_is_continued(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    run.save(4, num_values=8 * MEGABYTE)
    run.upload_all()
    folder, files = tmp_path / "local", {}
    staged = folder / "checkpoints" / f".fetching-{step(4)}"

    class Interrupted(BaseException):
        pass

    class InterruptingConsole(Console):
        def print(self, *arguments: Any, **options: Any) -> None:
            """Interrupt after the first megabyte of the checkpoint."""
            if (staged / "model.safetensors").exists():
                raise Interrupted

    with pytest.raises(Interrupted):
        fetch_run(run.url, folder, console=InterruptingConsole(file=StringIO()))
    assert not (folder / "checkpoints" / step(4)).exists() and not (folder / "config.yaml").exists()
    arrived = (staged / "model.safetensors").stat().st_size
    assert 0 < arrived < 8 * 2**20
    sizes = {}
    original = type(run.remote).download

    def count_bytes(self: Any, key: str, path: Path, size: int, moved: Any = no_progress) -> str:
        files[key] = path.stat().st_size if path.exists() else 0
        return original(
            self, key, path, size, lambda count: sizes.update({key: sizes.get(key, 0) + count}) or moved(count)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.remote), "download", count_bytes)
        fetch_run(run.url, folder)
    key = f"checkpoints/{step(4)}/model.safetensors"
    assert files[key] == arrived and sizes[key] == (run.folder / key).stat().st_size - arrived
    assert CheckpointStore(folder).latest().name == step(4)
    assert (folder / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def raise_interrupt(*_: Any) -> bool:
    raise KeyboardInterrupt


def test_old_metrics_are_replaced_after_an_interruption(
    run: RunInS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_run(run.url, tmp_path / "local")
    run.save(4)
    run.upload_all()
    with monkeypatch.context() as patch:
        patch.setattr("wmtp.s3.fetch._is_run_file", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_run(run.url, folder)
    assert CheckpointStore(folder).latest().name == step(4)
    assert (folder / "metrics.jsonl").read_bytes() != (run.folder / "metrics.jsonl").read_bytes()
    fetch_run(run.url, folder)
    assert (folder / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def test_download_survives_dropped_connections(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.answer(503, 2), proxy.drop(6)
    local = fetch_run(run.url, tmp_path / "local", options(proxy))
    assert proxy.done["drop"] == 6 and CheckpointStore(local).latest().name == step(3)


def test_a_store_without_response_is_unreachable(
    run: RunInS3, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.s3.retry.ATTEMPTS", 1)
    proxy.dead = True
    with pytest.raises(StoreUnreachable):
        fetch_run(run.url, tmp_path / "local", options(proxy))
    assert not (tmp_path / "local").exists()


def test_only_the_best_checkpoint_is_needed_to_use_a_model(run: RunInS3, tmp_path: Path) -> None:
    local = fetch_run(run.url, tmp_path / "local", checkpoints="best")
    assert sorted(path.name for path in local.rglob("step_*")) == [step(1)]
    top = {path.name for path in local.iterdir()}
    assert top == {".hydra", "run.json", "config.yaml", "mlflow.json", "checkpoints"}
    assert (CheckpointStore(local).best() or local).name == step(1)
    run.save(4, best=0.1)
    run.upload_all()
    fetch_run(run.url, local, checkpoints="best")
    assert (CheckpointStore(local).best() or local).name == step(4)
    fetch_run(run.url, local)
    assert CheckpointStore(local).latest().name == step(4) and (local / "metrics.jsonl").exists()


def test_the_newest_checkpoint_is_used_if_there_is_no_best(object_store: ObjectStore, tmp_path: Path) -> None:
    run = RunInS3(tmp_path / "run", f"s3://{object_store.bucket}/one")
    run.save(1), run.save(2)
    run.upload_all()
    local = fetch_run(run.url, tmp_path / "local", checkpoints="best")
    assert CheckpointStore(local).latest().name == step(2) and CheckpointStore(local).best() is None


def test_single_checkpoint_is_downloaded_alone(run: RunInS3, tmp_path: Path) -> None:
    path = fetch_run(f"{run.url}/checkpoints/{step(2)}/", tmp_path / "local")
    assert path == tmp_path / "local" / "checkpoints" / step(2) and load(path).state == {"step": 2}
    assert (path.parent.parent / "config.yaml").exists()
    assert [content.name for content in path.parent.iterdir()] == [step(2)]
    stage_1_checkpoint = fetch_run(f"{run.url}/pretrain/checkpoints/{step(1)}", tmp_path / "local")
    assert (
        stage_1_checkpoint == tmp_path / "local" / "pretrain" / "checkpoints" / step(1)
        and find_damage(stage_1_checkpoint) is None
    )
    with pytest.raises(InputError, match="there is no complete checkpoint"):
        fetch_run(f"{run.url}/checkpoints/{step(8)}", tmp_path / "local")


@pytest.mark.parametrize("content", ["something else", "another run", "a running one"])
def test_folder_of_another_run_or_in_use_is_not_changed(run: RunInS3, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "local"
    if content == "something else":
        folder.mkdir()
        (folder / "thesis.tex").touch()
    else:
        fetch_run(run.url, folder)
    if content == "another run":
        (folder / "run.json").write_text(json.dumps({"id": "f" * 32, "remote": None}))
    (folder / ".hydra").mkdir(exist_ok=True)
    run.save(4)
    run.upload_all()
    before = read_files(folder)
    with (folder / LOCK).open("w") as lock:
        if content == "a running one":
            fcntl.flock(lock, fcntl.LOCK_EX)
        message = "a command is running in it" if content == "a running one" else "contains other data than the run"
        with pytest.raises(InputError, match=message):
            fetch_run(run.url, folder)
    before.pop(str(LOCK), None)
    assert {key: value for key, value in read_files(folder).items() if key != str(LOCK)} == before


def test_other_objects_are_not_downloaded(run: RunInS3, tmp_path: Path) -> None:
    for key in ("status.json", ".hydra/lock", "evaluations/a.json", ".hydra/x/y.yaml", "checkpoints/step_1/z", "other"):
        run.remote.put_bytes(b"{}", key)
    local = fetch_run(run.url, tmp_path / "local")
    names = {path.name for path in local.rglob("*")}
    assert not names & {"status.json", "lock", "a.json", "y.yaml", "z", "other"}


def test_manifest_with_files_outside_its_folder_is_damaged(run: RunInS3, tmp_path: Path) -> None:
    path = run.folder / "checkpoints" / step(3)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    content["files"]["../../../escaped"] = content["files"]["state.json"]
    from wmtp.checkpoint.manifest import _add_hash

    run.remote.put_bytes(_add_hash(content), f"checkpoints/{step(3)}/manifest.json")
    local = fetch_run(run.url, tmp_path / "local")
    assert CheckpointStore(local).latest().name == step(2) and not list(tmp_path.rglob("escaped"))


def test_only_run_below_a_url_is_found(run: RunInS3, object_store: ObjectStore, tmp_path: Path) -> None:
    bucket = f"s3://{object_store.bucket}"
    for url in (run.url, run.url + "/", f"{run.url}/checkpoints/{step(1)}", f"{bucket}/runs", bucket):
        assert find_run(url) == run.url
    with pytest.raises(InputError, match="there is no run at or below this URL"):
        find_run(f"{bucket}/elsewhere")
    with pytest.raises(InputError, match="there is no run"):
        fetch_run(f"{bucket}/elsewhere", tmp_path / "local")
    assert not (tmp_path / "local").exists()
    for number in range(12):
        run.remote.put_bytes(b"", f"../more/{number:02d}/config.yaml".replace("../", "jobs/"))
    assert find_run(run.url) == run.url
    with pytest.raises(InputError, match="there are several runs; choose one of them") as raised:
        find_run(f"{run.url}/jobs")
    assert str(raised.value).count("s3://") == 11 and "…" in str(raised.value)


def test_local_folder_has_date_and_name() -> None:
    for url, folder in {
        "s3://bucket/prefix/2026-11-21/12-00-00-abcd": "outputs/2026-11-21/12-00-00-abcd",
        "s3://bucket/2026-11-21/12-00-00-abcd/3/": "outputs/2026-11-21/12-00-00-abcd/3",
        f"s3://bucket/2026-11-21/name/checkpoints/{step(7)}": "outputs/2026-11-21/name",
        "s3://bucket/prefix/name": "outputs/name",
        "s3://bucket/prefix/2026-11-21": "outputs/2026-11-21",
    }.items():
        assert local_folder(url) == Path(folder)
    for url in ("s3://bucket", "s3://bucket/2026-11-21/.."):
        with pytest.raises(InputError, match="is not the URL of a run"):
            local_folder(url)


def test_download_progress_is_printed(run: RunInS3, tmp_path: Path) -> None:
    out = StringIO()
    fetch_run(run.url, tmp_path / "local", console=Console(file=out, width=200))
    assert f"fetching {run.url}/checkpoints/{step(3)}: 4" in out.getvalue() and "kB of" in out.getvalue()
    shutil.rmtree(tmp_path / "local")
