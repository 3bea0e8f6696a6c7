"""Bringing a run from S3: whole, verified, and no further than what is here."""

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
from wmtp.checkpoint.manifest import damage
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.errors import InputError
from wmtp.runtime.run_dir import LOCK
from wmtp.s3.client import S3Options, StoreUnreachable
from wmtp.s3.fetch import fetch_run, find_run, local_folder
from wmtp.s3.layout import is_uploaded

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("servers"),
    pytest.mark.usefixtures("keys"),
]
MEGABYTE = 250_000


@pytest.fixture
def run(object_store: ObjectStore, tmp_path: Path) -> RunInS3:
    """A run of three checkpoints, of which the first is the best, and of a stage before."""
    run = RunInS3(tmp_path / "run", f"s3://{object_store.bucket}/runs/2026-11-21/one")
    for number in (1, 2):
        run.save(number, stage="pretrain", best=1.0 if number == 1 else None)
    (run.folder / "pretrain" / "result.json").write_text(json.dumps({"saved": f"pretrain/checkpoints/{step(1)}"}))
    for number in (1, 2, 3):
        run.save(number, best=0.5 if number == 1 else None)
    (run.folder / "mlflow.json").write_text("{}")
    run.mirrored()
    return run


def content_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def spoil(run: RunInS3, key: str) -> None:
    content = bytearray(run.remote.get(key) or b"")
    content[len(content) // 2] ^= 1
    run.remote.put_bytes(bytes(content), key)


def options(proxy: FaultyProxy) -> S3Options:
    return S3Options(endpoint_url=proxy.url)


def test_a_run_comes_byte_for_byte(run: RunInS3, tmp_path: Path) -> None:
    there = fetch_run(run.url, tmp_path / "there")
    neither_newest_nor_best = f"checkpoints/{step(2)}/"
    theirs = {key: each for key, each in content_of(run.folder).items() if not key.startswith(neither_newest_nor_best)}
    assert content_of(there) == theirs and len(theirs) > 20
    store = CheckpointStore(there)
    assert store.latest().name == step(3) and (store.best() or there).name == step(1)
    assert load(store.latest()).state == {"step": 3}
    assert all(is_uploaded(there / "checkpoints" / step(number), run.url) for number in (1, 3))


def test_fetching_again_asks_for_no_checkpoint(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    fetch_run(run.url, tmp_path / "there")
    before = content_of(tmp_path / "there")
    fetch_run(run.url, tmp_path / "there", options(proxy))
    assert content_of(tmp_path / "there") == before
    assert proxy.requests["GET"] < 20


def test_what_came_since_is_added(run: RunInS3, tmp_path: Path) -> None:
    fetch_run(run.url, tmp_path / "there")
    run.save(4, best=0.4)
    run.mirrored()
    fetch_run(run.url, tmp_path / "there")
    store = CheckpointStore(tmp_path / "there")
    assert store.latest().name == step(4) and (store.best() or run.folder).name == step(4)
    assert (tmp_path / "there" / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def test_a_copy_that_is_further_stays_as_it_is(run: RunInS3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = fetch_run(run.url, tmp_path / "there")
    RunInS3(copy, run.url).save(9)
    before = content_of(copy)
    fetch_run(run.url, copy)
    assert content_of(copy) == before and "is further than" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    run: RunInS3, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(run, f"checkpoints/{step(3)}/{name}")
    there = fetch_run(run.url, tmp_path / "there")
    assert CheckpointStore(there).latest().name == step(2) and damage(there / "checkpoints" / step(2)) is None
    assert f"checkpoints/{step(3)} is not whole there" in caplog.text
    assert not list((there / "checkpoints").glob(".fetching-*"))
    assert json.loads((there / "checkpoints" / "latest.json").read_text())["folder"] == step(2)


def test_a_checkpoint_without_a_file_or_manifest_is_none(run: RunInS3, tmp_path: Path) -> None:
    run.remote.delete([f"checkpoints/{step(3)}/model.safetensors", f"checkpoints/{step(2)}/manifest.json"])
    there = fetch_run(run.url, tmp_path / "there")
    assert CheckpointStore(there).latest().name == step(1)
    run.remote.delete([key for key, _ in run.remote.listed() if key.endswith("/manifest.json")])
    with pytest.raises(InputError, match="has no whole checkpoint there"):
        fetch_run(run.url, tmp_path / "elsewhere")


def test_control_a_download_alone_takes_what_is_damaged(run: RunInS3, tmp_path: Path) -> None:
    key = f"checkpoints/{step(3)}/model.safetensors"
    spoil(run, key)
    run.remote._client.download_file(run.remote.bucket, run.remote.prefix + key, str(tmp_path / "model"))
    assert (tmp_path / "model").read_bytes() != (run.folder / key).read_bytes()


def test_a_byte_flipped_on_the_way_is_brought_again(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.flip(1, ("GET",))
    there = fetch_run(run.url, tmp_path / "there", S3Options(endpoint_url=proxy.url, checksums="when_required"))
    assert proxy.done["flip"] == 1 and CheckpointStore(there).latest().name == step(3)


def test_a_result_without_the_checkpoint_it_speaks_of_is_left_out(run: RunInS3, tmp_path: Path) -> None:
    spoil(run, f"pretrain/checkpoints/{step(1)}/model.safetensors")
    there = fetch_run(run.url, tmp_path / "there")
    assert not (there / "pretrain" / "result.json").exists()
    assert CheckpointStore(there / "pretrain").latest().name == step(2)


def test_errors_at_the_first_question_are_survived(run: RunInS3, proxy: FaultyProxy) -> None:
    """A client's own few attempts are over at the third."""
    options = S3Options(endpoint_url=proxy.url)
    proxy.answer(503, 4)
    assert find_run(run.url.rpartition("/")[0], options) == run.url
    assert proxy.done["answer"] == 4


def test_an_interrupted_download_goes_on(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    run.save(4, numbers=8 * MEGABYTE)
    run.mirrored()
    folder, files = tmp_path / "there", {}
    staged = folder / "checkpoints" / f".fetching-{step(4)}"

    class Interrupted(BaseException):
        pass

    class Impatient(Console):
        def print(self, *arguments: Any, **options: Any) -> None:
            """Called when the first megabyte of the checkpoint has come."""
            if (staged / "model.safetensors").exists():
                raise Interrupted

    with pytest.raises(Interrupted):
        fetch_run(run.url, folder, console=Impatient(file=StringIO()))
    assert not (folder / "checkpoints" / step(4)).exists() and not (folder / "config.yaml").exists()
    arrived = (staged / "model.safetensors").stat().st_size
    assert 0 < arrived < 8 * 2**20
    sizes = {}
    original = type(run.remote).download

    def counted(self: Any, key: str, path: Path, size: int, moved: Any) -> str:
        files[key] = path.stat().st_size if path.exists() else 0
        return original(
            self, key, path, size, lambda count: sizes.update({key: sizes.get(key, 0) + count}) or moved(count)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.remote), "download", counted)
        fetch_run(run.url, folder)
    key = f"checkpoints/{step(4)}/model.safetensors"
    assert files[key] == arrived and sizes[key] == (run.folder / key).stat().st_size - arrived
    assert CheckpointStore(folder).latest().name == step(4)
    assert (folder / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def interrupted(*_: Any) -> bool:
    raise KeyboardInterrupt


def test_records_that_are_older_than_what_came_are_brought_after_an_interruption(
    run: RunInS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_run(run.url, tmp_path / "there")
    run.save(4)
    run.mirrored()
    with monkeypatch.context() as patch:
        patch.setattr("wmtp.s3.fetch._is_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_run(run.url, folder)
    assert CheckpointStore(folder).latest().name == step(4)
    assert (folder / "metrics.jsonl").read_bytes() != (run.folder / "metrics.jsonl").read_bytes()
    fetch_run(run.url, folder)
    assert (folder / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()


def test_drops_are_survived(run: RunInS3, tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.answer(503, 2), proxy.drop(6)
    there = fetch_run(run.url, tmp_path / "there", options(proxy))
    assert proxy.done["drop"] == 6 and CheckpointStore(there).latest().name == step(3)


def test_a_store_that_does_not_answer_is_unreachable(
    run: RunInS3, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.s3.download.ATTEMPTS", 1)
    proxy.dead = True
    with pytest.raises(StoreUnreachable):
        fetch_run(run.url, tmp_path / "there", options(proxy))
    assert not (tmp_path / "there").exists()


def test_to_use_a_model_the_best_is_enough(run: RunInS3, tmp_path: Path) -> None:
    there = fetch_run(run.url, tmp_path / "there", checkpoints="best")
    assert sorted(path.name for path in there.rglob("step_*")) == [step(1)]
    top = {path.name for path in there.iterdir()}
    assert top == {".hydra", "run.json", "config.yaml", "mlflow.json", "checkpoints"}
    assert (CheckpointStore(there).best() or there).name == step(1)
    run.save(4, best=0.1)
    run.mirrored()
    fetch_run(run.url, there, checkpoints="best")
    assert (CheckpointStore(there).best() or there).name == step(4)
    fetch_run(run.url, there)
    assert CheckpointStore(there).latest().name == step(4) and (there / "metrics.jsonl").exists()


def test_without_a_best_the_last_is_used(object_store: ObjectStore, tmp_path: Path) -> None:
    run = RunInS3(tmp_path / "run", f"s3://{object_store.bucket}/one")
    run.save(1), run.save(2)
    run.mirrored()
    there = fetch_run(run.url, tmp_path / "there", checkpoints="best")
    assert CheckpointStore(there).latest().name == step(2) and CheckpointStore(there).best() is None


def test_one_checkpoint_comes_alone(run: RunInS3, tmp_path: Path) -> None:
    path = fetch_run(f"{run.url}/checkpoints/{step(2)}/", tmp_path / "there")
    assert path == tmp_path / "there" / "checkpoints" / step(2) and load(path).state == {"step": 2}
    assert (path.parent.parent / "config.yaml").exists()
    assert [each.name for each in path.parent.iterdir()] == [step(2)]
    early = fetch_run(f"{run.url}/pretrain/checkpoints/{step(1)}", tmp_path / "there")
    assert early == tmp_path / "there" / "pretrain" / "checkpoints" / step(1) and damage(early) is None
    with pytest.raises(InputError, match="there is no whole checkpoint"):
        fetch_run(f"{run.url}/checkpoints/{step(8)}", tmp_path / "there")


@pytest.mark.parametrize("content", ["something else", "another run", "a running one"])
def test_a_folder_that_is_not_this_runs_or_in_use_is_not_touched(run: RunInS3, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "there"
    if content == "something else":
        folder.mkdir()
        (folder / "thesis.tex").touch()
    else:
        fetch_run(run.url, folder)
    if content == "another run":
        (folder / "run.json").write_text(json.dumps({"id": "f" * 32, "remote": None}))
    (folder / ".hydra").mkdir(exist_ok=True)
    run.save(4)
    run.mirrored()
    before = content_of(folder)
    with (folder / LOCK).open("w") as lock:
        if content == "a running one":
            fcntl.flock(lock, fcntl.LOCK_EX)
        said = "a command is running in it" if content == "a running one" else "holds something else than the run"
        with pytest.raises(InputError, match=said):
            fetch_run(run.url, folder)
    before.pop(str(LOCK), None)
    assert {key: value for key, value in content_of(folder).items() if key != str(LOCK)} == before


def test_files_that_no_run_sends_stay_there(run: RunInS3, tmp_path: Path) -> None:
    for key in ("status.json", ".hydra/lock", "evaluations/a.json", ".hydra/x/y.yaml", "checkpoints/step_1/z", "other"):
        run.remote.put_bytes(b"{}", key)
    there = fetch_run(run.url, tmp_path / "there")
    names = {path.name for path in there.rglob("*")}
    assert not names & {"status.json", "lock", "a.json", "y.yaml", "z", "other"}


def test_a_manifest_that_names_files_elsewhere_is_damaged(run: RunInS3, tmp_path: Path) -> None:
    path = run.folder / "checkpoints" / step(3)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    content["files"]["../../../escaped"] = content["files"]["state.json"]
    from wmtp.checkpoint.manifest import _sealed

    run.remote.put_bytes(_sealed(content), f"checkpoints/{step(3)}/manifest.json")
    there = fetch_run(run.url, tmp_path / "there")
    assert CheckpointStore(there).latest().name == step(2) and not list(tmp_path.rglob("escaped"))


def test_the_only_run_below_a_place_is_found(run: RunInS3, object_store: ObjectStore, tmp_path: Path) -> None:
    bucket = f"s3://{object_store.bucket}"
    for url in (run.url, run.url + "/", f"{run.url}/checkpoints/{step(1)}", f"{bucket}/runs", bucket):
        assert find_run(url) == run.url
    with pytest.raises(InputError, match="there is no run, nor below"):
        find_run(f"{bucket}/elsewhere")
    with pytest.raises(InputError, match="there is no run"):
        fetch_run(f"{bucket}/elsewhere", tmp_path / "there")
    assert not (tmp_path / "there").exists()
    for number in range(12):
        run.remote.put_bytes(b"", f"../more/{number:02d}/config.yaml".replace("../", "jobs/"))
    assert find_run(run.url) == run.url
    with pytest.raises(InputError, match="several runs lie there; name one of them") as raised:
        find_run(f"{run.url}/jobs")
    assert str(raised.value).count("s3://") == 11 and "…" in str(raised.value)


def test_a_run_is_kept_under_its_date_and_name() -> None:
    for url, folder in {
        "s3://bucket/prefix/2026-11-21/12-00-00-abcd": "outputs/2026-11-21/12-00-00-abcd",
        "s3://bucket/2026-11-21/12-00-00-abcd/3/": "outputs/2026-11-21/12-00-00-abcd/3",
        f"s3://bucket/2026-11-21/name/checkpoints/{step(7)}": "outputs/2026-11-21/name",
        "s3://bucket/prefix/name": "outputs/name",
        "s3://bucket/prefix/2026-11-21": "outputs/2026-11-21",
    }.items():
        assert local_folder(url) == Path(folder)
    for url in ("s3://bucket", "s3://bucket/2026-11-21/.."):
        with pytest.raises(InputError, match="names no run"):
            local_folder(url)


def test_what_is_brought_is_shown(run: RunInS3, tmp_path: Path) -> None:
    out = StringIO()
    fetch_run(run.url, tmp_path / "there", console=Console(file=out, width=200))
    assert f"fetching {run.url}/checkpoints/{step(3)}: 4" in out.getvalue() and "kB of" in out.getvalue()
    shutil.rmtree(tmp_path / "there")
