"""Tests of the algorithms through the train command: their stages, the results of stage 1, and resuming."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.conftest import TINY, Invoke, run_command
from wmtp.algorithms.critic import Whitening
from wmtp.checkpoint.state import Snapshot
from wmtp.checkpoint.store import CheckpointStore
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("stages")  # they share runs that take half a minute

RUN = [
    "max_steps=12", "batch_size=4", "micro_batch_size=2", "model.dropout=0.1", "log_interval=1", "eval_interval=4",
    "save_interval=1", "checkpoint.keep_last=99", "early_stopping=none", "early_stopping.window=10",
    "data.noise=0.5",
]  # fmt: skip
ALGORITHMS = {
    "critic": ["algo=critic", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "rho1": ["algo=rho1", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "token_skip": ["algo=rho1_token_skip", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "shuffled": ["algo=shuffled", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "random": ["algo=random", "algo.of=rho1", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "implicit": ["algo=implicit_reward", "pretrain.start=rho1", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
    "contrast": ["algo=contrast", "pretrain.num_epochs=3", "pretrain.max_steps=6"],
}


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one complete run of each algorithm."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, overrides in ALGORITHMS.items():
            common = ["tracking=none", f"cache_dir={cache}", *TINY, *RUN]
            assert run_command([*common, *overrides, f"hydra.run.dir={name}"], patch) == 0
    return folder


def cut_back(run: Path, name: str, stage: str, step: int) -> Path:
    """Return a copy of a run's folder in the state after a crash, with `step` as the last checkpoint of a stage."""
    folder = Path(shutil.copytree(run, name))
    (folder / "summary.json").unlink()
    if stage:
        (folder / stage / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()
    for path in (folder / stage / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder


def trace(run: Path) -> dict[str, Any]:
    """Return everything that must be equal in a resumed and an uninterrupted run."""
    last = run / "checkpoints" / "step_00000012"
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    ignored = ("time", "train/tokens_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines += [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    return {"files": files, "metrics": [{k: v for k, v in line.items() if k not in ignored} for line in lines]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [
        *((name, "", 5) for name in ALGORITHMS if name != "contrast"),
        pytest.param("contrast", "", 5, marks=pytest.mark.deep),
        *((name, "pretrain", 3) for name in ("critic", "rho1", "contrast", "implicit")),
        *(pytest.param(name, "pretrain", 3, marks=pytest.mark.deep) for name in ("token_skip", "shuffled", "random")),
    ],
)
def test_every_algorithm_resumes_bit_for_bit_in_either_stage(
    invoke: Invoke, runs: Path, name: str, stage: str, step: int
) -> None:
    resumed = cut_back(runs / name, "resumed", stage, step)
    outcome = invoke(f"resume={resumed}", tiny=False)
    assert outcome.code == 0, outcome.err
    assert f"{stage}/checkpoints/step_{step:08d}".lstrip("/") in outcome.out
    assert trace(resumed) == trace(runs / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "broken", "attribute"),
    [
        ("critic", Whitening, "finish_update"),
        ("shuffled", "wmtp.algorithms.controls.Control", "load_state_dict"),
        ("rho1", EarlyStopping, "load_state_dict"),
    ],
)
def test_a_resume_without_the_algorithms_state_gives_another_run(
    invoke: Invoke, runs: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, attribute: str
) -> None:
    resumed = cut_back(runs / name, "resumed", "", 5)
    target = (
        f"{broken}.{attribute}" if isinstance(broken, str) else f"{broken.__module__}.{broken.__name__}.{attribute}"
    )
    monkeypatch.setattr(target, lambda *arguments: None)
    assert invoke(f"resume={resumed}", tiny=False).code == 0
    assert trace(resumed) != trace(runs / name)


@pytest.mark.slow
def test_a_run_cannot_be_resumed_with_another_weighting_or_reference(invoke: Invoke, runs: Path) -> None:
    resumed = cut_back(runs / "rho1", "resumed", "", 5)
    for change, message in (("algo=rho1_token_skip", "objective: was ExcessLoss, is now TokenSkip"),
                         ("algo.temperature=0.5", "the first is temperature: was 1.0, is now 0.5"),
                         (f"algo.reference={runs / 'rho1'}", "data: was")):  # fmt: skip
        outcome = invoke(f"resume={resumed}", change, tiny=False)
        assert outcome.code == 2 and message in outcome.err


@pytest.mark.slow
def test_stage_1_writes_its_result_and_checkpoints_in_the_format_of_a_run(runs: Path) -> None:
    for name in ALGORITHMS:
        folder = runs / name / "pretrain"
        result = json.loads((folder / "result.json").read_text())
        assert {"saved", "final_loss", "total_steps", "early_stopped", "stop_reason"} <= set(result)
        assert result["total_steps"] == 6 and result["early_stopped"] is False
        assert (runs / name / result["saved"] / "model.safetensors").exists()
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert max(steps) == 6
        assert (folder / "config.yaml").exists()
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["pretrain"]["total_steps"] == 6
        noise_auc = summary["weights"]["noise_auc"]
        assert 0 <= noise_auc <= 1


@pytest.mark.slow
def test_stage_2_starts_from_the_value_head_and_the_trunk_of_stage_1(runs: Path) -> None:
    saved = json.loads((runs / "critic" / "pretrain" / "result.json").read_text())["saved"]
    model = load_file(runs / "critic" / saved / "model.safetensors")
    head = load_file(runs / "critic" / "pretrain" / "value_head.safetensors")
    first = load_file(runs / "critic" / "checkpoints" / "step_00000001" / "model.safetensors")
    for name, tensor in head.items():
        assert np.array_equal(tensor, model[f"value_head.{name}"])
    moved = (first["embedding.weight"] - model["embedding.weight"]).abs().max()
    fresh = load_file(runs / "rho1" / "checkpoints" / "step_00000001" / "model.safetensors")
    assert moved < (first["embedding.weight"] - fresh["embedding.weight"]).abs().max()


@pytest.mark.slow
def test_stage_1_can_be_reused_from_another_run(invoke: Invoke, runs: Path) -> None:
    outcome = invoke(*RUN, "algo=critic", f"pretrain.reuse={runs / 'critic'}", "hydra.run.dir=reused")
    assert outcome.code == 0, outcome.err
    summary, expected = (json.loads((run / "summary.json").read_text()) for run in (Path("reused"), runs / "critic"))
    assert summary["final_loss"] == expected["final_loss"]
    assert summary["pretrain"]["total_steps"] == 6
    shutil.rmtree("reused/checkpoints/step_00000012")
    other = invoke("resume=reused", f"pretrain.reuse={Path('gone')}", tiny=False)
    assert other.code == 0, "the copied stage does not have the id of this run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "source", "message"),
    [
        (
            ["algo=critic"],
            "rho1",
            "differs:\n  pretrain._target_: wmtp.training.stages.ReferenceStage in that run, "
            "wmtp.training.stages.ValueStage in this run\n",
        ),
        (["algo=critic", "model.dim=32"], "critic", "model.dim: 64 in that run, 32 in this run"),
        (["algo=rho1"], "nowhere", "is missing"),
    ],
)
def test_a_stage_1_that_does_not_match_is_not_reused(
    invoke: Invoke, runs: Path, overrides: list[str], source: str, message: str
) -> None:
    for dry_run in ("false", "true"):
        outcome = invoke(*overrides, f"pretrain.reuse={runs / source}", f"dry_run={dry_run}", *RUN)
        assert outcome.code == 2 and message in outcome.err


@pytest.mark.slow
def test_the_settings_of_a_begun_stage_1_cannot_change(invoke: Invoke, runs: Path) -> None:
    for stage, step in (("", 5), ("pretrain", 3)):
        resumed = cut_back(runs / "critic", f"resumed-{stage}", stage, step)
        before = (resumed / "pretrain" / "config.yaml").read_bytes()
        outcome = invoke(f"resume={resumed}", "pretrain.language_model_coef=0.5", tiny=False)
        assert outcome.code == 2 and "pretrain.language_model_coef: was 1.0, is now 0.5" in outcome.err
        assert (resumed / "pretrain" / "config.yaml").read_bytes() == before
        assert invoke(f"resume={resumed}", tiny=False).code == 0


@pytest.mark.slow
def test_a_signal_in_the_last_update_of_stage_1_is_not_lost(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    validate = Trainer.validate

    def validate_with_signal(self: Trainer, max_batches: int | None = None) -> bool:
        if self.position.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return validate(self, max_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", validate_with_signal)
        outcome = invoke(*RUN, *ALGORITHMS["critic"], "hydra.run.dir=stopped")
    assert outcome.code == 143 and "resume=stopped" in outcome.err
    assert json.loads(Path("stopped/status.json").read_text())["state"] == "KILLED"
    assert not Path("stopped/metrics.jsonl").exists()
    assert invoke("resume=stopped", tiny=False).code == 0
    assert trace(Path("stopped")) == trace(runs / "critic")


@pytest.mark.slow
def test_a_named_reference_replaces_stage_1_with_equal_results(invoke: Invoke, runs: Path) -> None:
    reference = runs / "rho1" / "pretrain"
    outcome = invoke(*RUN, "algo=rho1", f"algo.reference={reference}", "hydra.run.dir=reference_run")
    assert outcome.code == 0, outcome.err
    summary, expected = (
        json.loads((run / "summary.json").read_text()) for run in (Path("reference_run"), runs / "rho1")
    )
    assert summary["final_loss"] == expected["final_loss"] and summary["pretrain"] is None


@pytest.mark.slow
def test_reference_losses_are_cached_for_later_runs(
    invoke: Invoke, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_if_called(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("wmtp.evaluation.token_columns.TokenColumns._write", fail_if_called)
    reference = f"algo.reference={runs / 'rho1' / 'pretrain'}"
    assert invoke(*RUN, "algo=rho1_token_skip", reference).code == 0
    assert invoke(*RUN, "algo=rho1", reference, "data.seed=1").code == 1, "losses of other data were used"


@pytest.mark.slow
def test_a_reference_with_another_tokenizer_is_refused(invoke: Invoke, runs: Path) -> None:
    reference = f"algo.reference={runs / 'rho1' / 'pretrain'}"
    outcome = invoke("algo=rho1", reference, "model.tokenizer.vocab_size=400", "max_steps=1")
    assert outcome.code == 2
    assert outcome.err.count("…") == 2 and "another tokenizer" in outcome.err


@pytest.mark.slow
def test_training_the_value_head_alone_does_not_change_the_trunk(invoke: Invoke) -> None:
    overrides = ("algo=critic_state", "pretrain.trains=head", "pretrain.max_steps=4", "max_steps=1", "save_interval=1")
    assert invoke(*overrides, "hydra.run.dir=run").code == 0
    first = sorted(Path("run/pretrain/checkpoints").glob("step_*"))[0]
    stage = load_file(first / "model.safetensors")
    assert invoke("max_steps=1", "optimizer.lr=1e-12", "hydra.run.dir=untrained").code == 0
    fresh = load_file(Path("untrained/checkpoints/step_00000001/model.safetensors"))
    for name, tensor in fresh.items():
        assert (tensor - stage[name]).abs().max() < 1e-9, name
    assert stage["value_head.output.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["algo=rho1", "pretrain=none"], "pretrain", "pretrain=rho1"),
        (["algo=baseline", "pretrain=rho1"], "pretrain", "pretrain=none"),
        (["algo=critic", "data.correct_ratio=1"], "data.correct_ratio", "same reward"),
        (["algo=critic", "pretrain.loss=mse"], "pretrain.loss", "'ranking'"),
        (["algo=critic", "pretrain.num_epoch=1"], "pretrain.num_epoch", "num_epochs"),
        (["algo=critic", "pretrain.optimizer.lr=-1"], "pretrain.optimizer", "learning rate"),
        (["algo=critic", "pretrain.early_stopping.monitor=val/los"], "pretrain.early_stopping.monitor", "val/loss"),
        (["algo=critic", "pretrain.loss=ranking", "data.group_tasks=false"], "pretrain.loss", "group_tasks=true"),
        (
            ["algo=critic", "pretrain.loss=ranking", "data.group_tasks=false", "pretrain.data.group_tasks=true"],
            "pretrain.loss",
            "set data.group_tasks=true",
        ),
        (
            ["algo=critic", "pretrain.loss=ranking", "micro_batch_size=1", "pretrain.micro_batch_size=2"],
            "pretrain.loss",
            "so batch_size and micro_batch_size must be even",
        ),
        (["algo=surprisal", "data.correct_ratio=1"], "pretrain.data.correct_ratio", "same reward"),
        (["algo=rho1", "algo.reference=initial", "pretrain=critic"], "pretrain", "would be left out"),
        (["algo=critic", "pretrain.model.dim=32"], "pretrain.model", "change model instead"),
        (["algo=critic", "pretrain.model.tokenizer.vocab_size=300"], "pretrain.model.tokenizer", "model.tokenizer"),
        (["algo=critic", "pretrain.model=null"], "pretrain.model", "nano"),
        (["algo=critic", "pretrain.optimizer=null"], "pretrain.optimizer", "adamw"),
        (["algo=critic", "pretrain.tags.a=1"], "pretrain.tags", "unknown key"),
        (["algo=critic", "pretrain.hardware.device=cpu"], "pretrain.hardware", "unknown key"),
        (["algo=critic", "pretrain.scheduler=cosin"], "pretrain.scheduler", "cosine"),
        (["algo=critic", "algo.weight_min=6"], "algo", "below weight_max=5"),
        (["algo=rho1_token_skip", "model.num_heads=1"], "model.num_heads", "2 heads"),
        (
            ["algo=critic", "pretrain.trains=head", "pretrain.early_stopping.monitor=val/mtp_loss"],
            "pretrain.early_stopping.monitor",
            "val/value_loss",
        ),
        (["algo=critic", "data.correct_ratio=null", "data.curated=true"], "data", "reward 1"),
        (["algo=shuffled", "algo.of=rho2"], "algo/of", "rho1"),
        (["algo=shuffled", "algo.of.beta=-1"], "algo.of.beta", "greater than 0"),
        (["early_stopping.monitor=val/value_loss"], "early_stopping.monitor", "val/loss"),
        (
            ["early_stopping.monitor=train/lr"],
            "early_stopping.monitor",
            "neither higher nor lower values are better; choose one of train/head_",
        ),
        (
            ["early_stopping.monitor=val/pass_rate", "num_validation_samples=0"],
            "early_stopping.monitor",
            "never measured",
        ),
        (["early_stopping.mode=all", "early_stopping.patience=null"], "early_stopping", "patience"),
        (["algo=rho1", "algo.reference=nowhere"], "algo.reference", "does not exist"),
    ],
)
def test_an_invalid_setting_is_named_with_the_allowed_values(
    invoke: Invoke, overrides: list[str], key: str, message: str
) -> None:
    outcome = invoke(*overrides)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.strip().startswith((f"{key}:", f"{key}="))]
    assert message.lower() in line.lower()


@pytest.mark.slow
def test_stage_1_can_monitor_the_value_loss(invoke: Invoke) -> None:
    overrides = ("algo=critic", "pretrain.early_stopping.monitor=val/value_loss", "pretrain.max_steps=2", "max_steps=1")
    assert invoke(*overrides).code == 0


@pytest.mark.slow
def test_an_early_stop_is_reported_everywhere_and_a_stopped_run_makes_no_more_updates(invoke: Invoke) -> None:
    criteria = ("early_stopping.window=10", "early_stopping.threshold=1e-9", "early_stopping.ratio=0.7")
    outcome = invoke("num_epochs=9", *criteria, "hydra.run.dir=run")
    assert outcome.code == 0
    status, summary = (json.loads(Path("run", name).read_text()) for name in ("status.json", "summary.json"))
    reason = "unstable: 10 of the last 10 gradient norms exceeded 1e-09"
    assert status["stop_reason"] == summary["stop_reason"] == reason and reason in outcome.out
    assert summary["early_stopped"] and summary["total_steps"] == 10
    assert invoke("resume=run", tiny=False).code == 0
    assert json.loads(Path("run/summary.json").read_text())["total_steps"] == 10


@pytest.mark.slow
def test_stage_1_can_override_options(invoke: Invoke) -> None:
    options = ("pretrain.model=nano", "pretrain.scheduler=constant", "pretrain.early_stopping=none", "model.dim=32")
    assert invoke("algo=rho1", *options, "max_steps=2", "hydra.run.dir=run").code == 0
    stage, training = (OmegaConf.load(Path("run", name, "config.yaml")) for name in ("pretrain", ""))
    assert (stage.model.dim, training.model.dim) == (64, 32)
    assert (stage.early_stopping.patience, training.early_stopping.patience) == (None, 5)
    assert "constant" in stage.scheduler["_target_"] and "cosine" in training.scheduler["_target_"]


@pytest.mark.slow
def test_a_dry_run_tries_both_stages_and_writes_nothing(invoke: Invoke, cache: Path) -> None:
    before = sorted(path.name for path in cache.iterdir())
    for algorithm in ("critic", "rho1"):
        outcome = invoke(f"algo={algorithm}", "dry_run=true")
        assert outcome.code == 0, outcome.err
        assert "Stage 1, " in outcome.out
    assert list(Path().iterdir()) == [] and sorted(path.name for path in cache.iterdir()) == before


@pytest.mark.slow
def test_a_signal_during_the_last_save_of_stage_1_ends_the_run_before_stage_2(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointStore.save

    def save_with_signal(self: CheckpointStore, step: int, snapshot: Snapshot) -> Path:
        path = save(self, step, snapshot)
        if path.parts[-3] == "pretrain":
            signal.raise_signal(signal.SIGTERM)
        return path

    monkeypatch.setattr(CheckpointStore, "save", save_with_signal)
    outcome = invoke("algo=rho1", "max_steps=2", "hydra.run.dir=run")
    assert outcome.code == 143 and not Path("run/checkpoints").exists()
    assert json.loads(Path("run/status.json").read_text())["state"] == "KILLED"
    assert invoke("resume=run", tiny=False).code == 0


@pytest.mark.slow
def test_a_run_without_stage_1_cannot_be_resumed_with_one(invoke: Invoke) -> None:
    assert invoke("max_steps=2", "hydra.run.dir=run").code == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.suffix == ".json"}
    refused = invoke("resume=run", "algo=critic", tiny=False)
    assert refused.code == 2 and "its training has begun without a stage 1" in refused.err
    assert {path: path.read_bytes() for path in before} == before and not Path("run/pretrain").exists()
    assert invoke("resume=run", "max_steps=3", tiny=False).code == 0, "a refused resume changed the run"
