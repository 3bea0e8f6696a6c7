"""Tests of all commands with a run of an earlier version, whose configs contain old module paths."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Invoke, run_command
from tests.support.servers import ObjectStore
from wmtp.config import moved_targets
from wmtp.sync import main as sync

RUN = Path(__file__).parents[1] / "fixtures" / "run_of_flat_modules"
"""The folder of a run of the earlier version."""
LOSS_AFTER_RESUME = 6.469458733739241
"""`val/loss` at update 9 when the run is resumed with max_steps=9.

With the order of samples and the learning rates of the earlier version it is 6.464352412216353, as it was there.
"""
EVALUATED_LOSS = 6.431378253094562
"""Loss of head 1 on the test split when the earlier version evaluated its own run."""


SEEDS_CRITIC = "algo=critic_state"
"""The critic of the earlier version, whose value head read the state after a token."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a writable copy of the run."""
    return shutil.copytree(RUN, tmp_path / "run")


def test_the_configs_contain_old_module_paths() -> None:
    """Without old module paths, the other tests would pass even if no path was translated."""
    for config in (RUN / "config.yaml", RUN / "pretrain" / "config.yaml"):
        for target in ("wmtp.trainer.Trainer", "wmtp.runtime.hardware.Hardware", "wmtp.stages.ValueStage"):
            assert f"_target_: {target}" in config.read_text()


@pytest.mark.slow
def test_resume_continues_from_the_state_of_the_earlier_version(run: Path, invoke: Invoke) -> None:
    other = invoke("resume=run", "max_steps=9", "report=false", tiny=False)
    assert other.code == 2 and "pretrain.loss=reward pretrain.value=state" in other.err
    done = invoke("resume=run", SEEDS_CRITIC, "max_steps=9", "report=false", tiny=False)
    assert done.code == 0, done.err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last"]["step"] == 9
    assert summary["last"]["val/loss"] == pytest.approx(LOSS_AFTER_RESUME, abs=1e-5)


@pytest.mark.slow
def test_a_new_run_can_reuse_stage_1_of_an_earlier_run(run: Path, invoke: Invoke) -> None:
    model = [f"model.{key}" for key in ("dim=16", "num_layers=1", "hidden_dim=32", "num_attention_heads=2")]
    done = invoke(SEEDS_CRITIC, *model, "model.num_kv_heads=1", "pretrain.reuse=run", "max_steps=1")
    assert done.code == 0, done.err


def test_an_earlier_run_can_be_evaluated(run: Path, invoke: Invoke) -> None:
    done = invoke("checkpoint=run", "evaluation.sandbox=none", command="evaluate")
    assert done.code == 0, done.err
    (summary,) = run.glob("evaluations/tasks-*/summary.json")
    loss = json.loads(summary.read_text())["prediction"]["head_1_loss"]
    assert loss == pytest.approx(EVALUATED_LOSS, abs=1e-5)


def test_an_earlier_run_can_generate(run: Path, invoke: Invoke) -> None:
    done = invoke("checkpoint=run", "prompt=Write", "generation.max_new_tokens=12", command="generate")
    assert (done.code, done.out != "") == (0, True), done.err
    assert "12 tokens" in done.err


@pytest.mark.slow
def test_an_earlier_run_can_be_compared(
    run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["model=nano", "model.dim=16", "model.num_layers=1", "hydra.run.dir=new", "algo=baseline", "pretrain=critic"]
    data = ["data.num_train=48", "data.num_validation=8", "data.num_test=8", "num_samples=2", "report=false"]
    assert invoke(*new, *data, "max_steps=2", "pretrain.max_steps=1", tiny=False).code == 0
    code = run_command(["run", "new", "baseline=algo=baseline", "reports=false"], monkeypatch, "compare")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    (written,) = Path("outputs/comparisons").rglob("compare.json")
    assert list(json.loads(written.read_text())["groups"]) == ["baseline", "critic"]
    assert "_target_" not in written.read_text(), "moved targets are not reported as differences"


def test_an_earlier_run_can_be_exported(run: Path, tmp_path: Path, invoke: Invoke) -> None:
    done = invoke("run", "out", "format=hf_trunk", command="export")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_old_targets_are_not_found_without_the_table_of_moved_targets(
    run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_targets, "MOVED_TARGETS", {})
    for command, arguments in (("evaluate", ["checkpoint=run"]), ("export", ["run", "out", "format=hf_trunk"])):
        done = invoke(*arguments, command=command)
        assert done.code == 2
        target = "wmtp.data.tokenization.task_tokenizer"
        assert f"run/config.yaml: model.tokenizer._target_={target}: cannot be imported" in done.err


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("s3")
@pytest.mark.usefixtures("s3_credentials")
def test_an_earlier_run_with_a_copy_in_s3_is_uploaded_resumed_and_evaluated(
    run: Path, invoke: Invoke, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is without the tables of moved keys."""
    url = f"s3://{object_store.bucket}/runs"
    node = f"  _target_: wmtp.checkpoint.store.RemoteCheckpointStore\n  remote: {url}\n  stall_seconds: 9.0\n"
    config, saved = (run / "config.yaml").read_text(), run / ".hydra" / "accepted.json"
    local = "  _target_: wmtp.checkpoint.store.CheckpointStore\n"
    assert local in config
    (run / "config.yaml").write_text(config.replace(local, node, 1))
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"remote": f"{url}/run"}))
    overrides = ["checkpoint=s3", f"++checkpoint.remote={url}", "++checkpoint.stall_seconds=9"]
    saved.write_text(json.dumps(json.loads(saved.read_text()) + overrides))

    with monkeypatch.context() as without_tables:
        without_tables.setattr(moved_targets, "MOVED_TO_S3", {})
        without_tables.setattr(moved_targets, "MOVED_KEYS", {})
        assert sync([str(run)]) == 2 and invoke("resume=run", "max_steps=9", tiny=False).code == 2
    assert object_store.keys(object_store.bucket) == []

    def steps() -> set[str]:
        """Return the names of the checkpoints in the bucket."""
        keys = (key.split("/") for key in object_store.keys(object_store.bucket))
        return {key[3] for key in keys if key[1:3] == ["run", "checkpoints"] and key[-1] == "manifest.json"}

    assert sync([str(run)]) == 0 and steps() == {path.name for path in run.glob("checkpoints/step_*")} != set()
    unconfirmed = invoke("resume=run", "max_steps=9", "report=false", tiny=False)
    assert unconfirmed.code == 2 and f"checkpoint.s3.url={url}: is a setting of run" in unconfirmed.err
    done = invoke("resume=run", SEEDS_CRITIC, "max_steps=9", "report=false", f"checkpoint.s3.url={url}", tiny=False)
    assert done.code == 0 and "step_00000009" in steps(), done.err
    assert f"    url: {url}\n" in (run / "config.yaml").read_text()
    assert invoke("checkpoint=run", "evaluation.sandbox=none", command="evaluate").code == 0


@pytest.mark.parametrize("target", moved_targets.MOVED_TARGETS)
def test_each_old_target_resolves_to_the_moved_class(target: str) -> None:
    from wmtp.config.targets import locate

    assert locate(target) is locate(moved_targets.MOVED_TARGETS[target])
