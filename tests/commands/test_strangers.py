"""Tests of what the folder of a run may not do, because it may come from a stranger. docs/security.md has the rules.

Each attack is tried on a copy of a trained run. Its control shows that the attack works without the rule.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import DictConfig

from tests.conftest import Invoke, run_command
from wmtp.checkpoint import manifest
from wmtp.cli import resolve
from wmtp.config import targets, trust
from wmtp.config.overrides import load_saved_overrides
from wmtp.config.schema import ConfigError
from wmtp.config.targets import locate
from wmtp.config.trust import load_run_config
from wmtp.errors import InputError
from wmtp.models.loading import find_checkpoint, read_run_config
from wmtp.runtime import destinations
from wmtp.runtime.untrusted_files import require_inside
from wmtp.s3.fetch import _is_run_file, is_safe_key
from wmtp.sweep.grid import parse_grid
from wmtp.sweep.state import SweepState
from wmtp.sync import main as sync
from wmtp.train import COMMAND
from wmtp.training.stage_results import read_stage_result, require_same_stage
from wmtp.training.uploads import send_pending

USES = {
    "generate": ["checkpoint=run", "prompt=hello", "generation.max_new_tokens=2"],
    "evaluate": ["checkpoint=run"],
    "export": ["run", "out", "format=hf_trunk"],
}
"""A command for each way to use the model of a run, with its arguments."""
HUB = {"_target_": "torch.hub.load", "repo_or_dir": "hub", "model": "number", "source": "local"}
"""A node that executes the file hubconf.py in the folder `hub`."""
EARLIER = Path(__file__).parents[1] / "fixtures" / "run_of_flat_modules"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a writable run. The user has not sent data anywhere before."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(destinations, "_used_by_this_process", set())
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(EARLIER, tmp_path / "run")


def change_config(run: Path, key: str, value: Any) -> None:
    """Set a dotted key in the config of a run."""
    path = run / "config.yaml"
    config = node = yaml.safe_load(path.read_text())
    *parents, name = key.split(".")
    for parent in parents:
        node = node[parent]
    node[name] = value
    path.write_text(yaml.safe_dump(config))


def write_hub(tmp_path: Path) -> Path:
    """Write the code that `HUB` executes, and return the path of the file that this code writes."""
    marker = tmp_path / "marker"
    (tmp_path / "hub").mkdir()
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n\ndef number():\n    return 16\n"
    (tmp_path / "hub" / "hubconf.py").write_text(code)
    return marker


@pytest.mark.parametrize("command", USES)
def test_a_run_cannot_execute_code(command: str, run: Path, tmp_path: Path, invoke: Invoke) -> None:
    marker = write_hub(tmp_path)
    change_config(run, "model.dim", HUB)
    refused = invoke(*USES[command], command=command)
    assert refused.code == 2 and not marker.exists()
    problem = "run/config.yaml: model.dim._target_=torch.hub.load: a plain value belongs here, not an object"
    assert problem in refused.err and "Traceback" not in refused.err


def test_control_the_code_is_executed_without_the_rules(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The naive version loads the config as it is, and Hydra's own function builds each object in it."""
    marker = write_hub(tmp_path)
    change_config(run, "model.dim", HUB)
    monkeypatch.setattr(trust, "placement_issues", lambda *arguments: [])
    config = load_run_config(run / "config.yaml")
    assert hydra.utils.instantiate(config.model.dim) == 16 and marker.exists()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tags", {"a": [HUB]}, "tags.a[0]._target_=torch.hub.load: a plain value belongs here"),
        ("data.template", {"_args_": [1], "_target_": "builtins.eval"}, "data.template._args_=[1]: a plain value"),
        (
            "model",
            {"_target_": "wmtp.algorithms.uniform.Uniform"},
            "has the wrong class; one of the kind ModelSource belongs here",
        ),
        (
            "algo._target_",
            "wmtp.runtime.atomic_files.replace_atomically",
            "has the wrong class; one of the kind Algorithm belongs here",
        ),
        (
            "optimizer._target_",
            "torch.optim.lr_scheduler.LambdaLR",
            "has the wrong class; one of the kind Optimizer belongs here",
        ),
        ("model.tokenizer._target_", "wmtp.data.tokenizer.Path", "is defined in pathlib, not in wmtp.data.tokenizer"),
        ("model._partial_", True, "model._partial_=True: a plain value belongs here"),
        ("run_name", "${oc.env:HOME}", "run_name=${oc.env:HOME}: is an interpolation"),
        ("data.max_length", "${seed}", "is an interpolation, but the files of a run contain plain values"),
        ("data.max_length", "many", "data.max_length=many: must be a valid integer"),
        ("data.template", ["{prompt}"], "data.template=['{prompt}']: must be a valid string"),
        ("algo", "critic", "its algo is not a class of wmtp"),
    ],
)
def test_a_config_contains_plain_values_and_known_classes(key: str, value: Any, problem: str, run: Path) -> None:
    change_config(run, key, value)
    with pytest.raises(InputError, match=re.escape(problem)):
        read_run_config(run / "config.yaml")


@pytest.mark.parametrize(
    "content", ["5", "- 1", "a: &b [*b]", "a: [&b [1], *b]", "{", "[" * 50_000, "a: ${b", b"\xff\xfe"], ids=range(8)
)
def test_a_config_of_another_shape_is_refused(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"config\.yaml"):
        load_run_config(path)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "torch.hub.load", "torch.optim.optimizer.torch", "torch.optim.optimizer.Any", "builtins.eval",
        "torch.optim.swa_utils.get_ema_avg_fn", "torch.optim.lr_scheduler.partial", "wmtp.cli.env.load_dotenv",
        "wmtp.sandbox.process.subprocess.run", "wmtp.runtime.run_dir.os.system", "wmtp.data.tokenizer.BackendTokenizer",
    ],
)  # fmt: skip
def test_only_what_wmtp_and_torch_optim_define_is_located(target: str) -> None:
    with pytest.raises(ValueError, match="must begin|cannot be imported|is defined in|is not a class|is neither"):
        locate(target)


def test_control_a_naive_locate_finds_imported_functions() -> None:
    import importlib

    assert callable(importlib.import_module("wmtp.cli.env").load_dotenv)
    assert "wmtp.cli.env.load_dotenv".startswith(targets.ALLOWED_TARGETS)


def test_typed_objects_are_refused_in_the_same_places(invoke: Invoke) -> None:
    refused = invoke("optimizer.lr={_target_:wmtp.data.tokenizer.task_tokenizer}", "algo._target_=torch.optim.AdamW")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "optimizer.lr._target_=wmtp.data.tokenizer.task_tokenizer: a plain value belongs here" in refused.err
    assert "algo._target_=torch.optim.AdamW: has the wrong class; one of the kind Algorithm belongs here" in refused.err


def add_override(run: Path, *overrides: str) -> None:
    """Append overrides to the saved overrides of a run."""
    path = run / ".hydra" / "accepted.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), *overrides]))


def resume(run: Path, *typed: str) -> str:
    """Return the issues of resuming a run whose metrics are sent to MLflow."""
    path = run / ".hydra" / "accepted.json"
    path.write_text(json.dumps([each for each in json.loads(path.read_text()) if each != "tracking=none"]))
    try:
        return "\n".join(map(str, resolve.compose(COMMAND, [f"resume={run.name}", *typed]).checked.issues))
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("hydra.job_logging.handlers.console.class=os.system", "may not change Hydra's own settings"),
        ("+hydra/launcher=basic", "may not change Hydra's own settings"),
        ("+data@hydra.callbacks=jsonl", "may not change Hydra's own settings"),
        ("++run_name=${oc.env:AWS_SECRET_ACCESS_KEY}", "reads more than other keys"),
        ("++tags={a: ['${oc.decode:x}']}", "reads more than other keys"),
        ("++sandbox=none", "sandbox=none: is a setting of run, with which programs run unprotected"),
        ("++cache_dir=elsewhere", "cache_dir=elsewhere: is a setting of run"),
        ("++tracking.uri=http://evil", "tracking.uri=http://evil: is a setting of run"),
        ("++model.tokenizer.vocab_size={_target_: torch.hub.load}", "a plain value belongs here"),
    ],
)
def test_saved_overrides_do_not_decide_what_the_user_must_decide(override: str, problem: str, run: Path) -> None:
    add_override(run, override)
    assert problem in resume(run)
    if "_target_" not in override and "hydra" not in override:
        retyped = f"{override.lstrip('+').partition('=')[0]}=null".replace("sandbox=null", "sandbox=none")
        retyped = retyped.replace("cache_dir=null", "cache_dir=elsewhere")
        assert problem not in resume(run, retyped), "what the user types is accepted"


def test_control_without_the_check_a_saved_override_chooses_the_server(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_override(run, "++tracking.uri=http://evil", "++sandbox=none")
    monkeypatch.setattr(resolve, "unconfirmed_issues", lambda *arguments: [])
    assert resume(run) == ""


def test_a_refused_run_is_not_changed(run: Path, invoke: Invoke) -> None:
    add_override(run, "++sandbox=none")
    refused = invoke("resume=run", "max_steps=7", tiny=False)
    assert refused.code == 2 and "sandbox=none: is a setting of run" in refused.err
    assert not (run / "checkpoints" / "step_00000007").exists()


@pytest.mark.slow
def test_a_destination_that_the_user_typed_once_is_known(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    add_override(run, "checkpoint=s3", "++checkpoint.s3.url=s3://bucket/runs", "++tracking.uri=http://server:5000")
    issues = resume(run)
    assert "checkpoint.s3.url=s3://bucket/runs: is a setting of run" in issues and "tracking.uri=" in issues
    destinations.remember_destinations(["s3://bucket/other", "http://server:5000/"])
    assert resume(run) == ""
    assert (tmp_path / "state" / "wmtp" / "destinations").read_text() == "http://server:5000\ns3://bucket\n"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_STATE_HOME")
    assert resume(run) == "", "what this process has used needs no file: resume=s3://bucket/… names the bucket"
    destinations._used_by_this_process.clear()
    assert "tracking.uri=" in resume(run), "without a home folder, nothing else is known"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert "tracking.uri=" not in resume(run), "the environment is trusted"


def test_sync_sends_nothing_to_a_server_of_the_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "http://127.0.0.1:9/"
    change_config(run, "tracking", {"_target_": "wmtp.tracking.mlflow.MlflowTracker", "uri": uri})
    assert sync([str(run)]) == 2
    assert f"its tracking.uri={uri} is a server that you have not used before" in capsys.readouterr().err
    change_config(run, "tracking.uri", None)
    state = {"run_id": "", "uri": uri, "experiment": "wmtp"}
    (run / "mlflow.json").write_text(json.dumps(state))  # data of an ended run are sent to the store that it names
    problem = f"its tracking.uri={uri} is a server that you have not used before"
    assert sync([str(run)]) == 2 and problem in capsys.readouterr().err
    (run / "config.yaml").unlink()  # the folder of a sweep has no config
    assert sync([str(run)]) == 2 and problem in capsys.readouterr().err
    (run / "sweep.json").write_text('{"jobs": []}')
    with pytest.raises(InputError, match=problem):
        SweepState.read(run)
    destinations.remember_destinations([uri])
    assert SweepState.read(run).jobs == [], "the control"


def test_a_job_of_a_resumed_sweep_cannot_choose_another_server_than_the_typed_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved overrides of a job with a checkpoint may name another server than sweep.json and the command."""
    typed = "tracking.uri=http://mine"
    job = {"number": 0, "overrides": parse_grid("train", [typed]).jobs[0], "state": "KILLED"}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": [job]}))
    add_override(shutil.copytree(run, tmp_path / "sweep" / "0"), "tracking=mlflow", "++tracking.uri=http://evil")
    assert run_command(["-m", "sweep.resume=sweep", typed], monkeypatch) == 2
    assert "tracking.uri=http://evil: is a setting of sweep" in capsys.readouterr().out


def test_destinations_of_the_environment_are_recorded_without_passwords(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@server")
    destinations.remember_destinations([])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert destinations.known_destinations() == {"https://server"}


@pytest.mark.parametrize("content", ["{}", "[1]", '["a', "null", "[" * 50_000], ids=range(5))
def test_saved_overrides_of_another_shape_are_refused(content: str, run: Path) -> None:
    (run / ".hydra" / "accepted.json").write_text(content)
    with pytest.raises(InputError, match=r"accepted\.json: is not a list of overrides"):
        load_saved_overrides([f"resume={run}"])


@pytest.mark.parametrize(
    "name",
    [
        "model/tokenizer.json", "checkpoints/step_00000009", "samples.jsonl", "pretrain", ".config.yaml.1.tmp",
        ".pretrain-copy", "0/console.log", "weights.bin",
    ],
)  # fmt: skip
def test_a_link_out_of_the_folder_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    path = run / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "secret").touch()
    path.symlink_to(os.path.relpath(tmp_path / "secret", path.parent))
    with pytest.raises(InputError, match=f"{name}: is a link out of the run's folder"):
        require_inside(run)
    path.unlink()
    path.symlink_to(os.path.relpath(run / "summary.json", path.parent))
    require_inside(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name}: is neither a file nor a folder"):
        require_inside(run)


def test_every_command_refuses_a_link_out_of_the_folder(
    run: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("{}")
    (run / "model").mkdir()
    (run / "model" / "tokenizer_config.json").symlink_to("../../secret")
    problem = "run/model/tokenizer_config.json: is a link out of the run's folder"
    for command, arguments in {**USES, "train": ["resume=run"]}.items():
        refused = invoke(*arguments, command=command, tiny=False)
        assert refused.code == 2 and problem in refused.err, command
    with pytest.raises(InputError, match=problem):
        require_same_stage(Path("run"), DictConfig({}))
    assert run_command(["run", "run"], monkeypatch, "compare") == 2 and problem in capsys.readouterr().err
    with pytest.raises(InputError, match=problem):
        send_pending(Path("run"), "KILLED")


@pytest.mark.parametrize("name", ["../../other/checkpoints/step_00000006", "/tmp/step_00000006", "..", 5, None])
def test_marks_name_only_checkpoints_of_the_run(name: Any, run: Path, tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path / "other")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"folder": name, "step": 6}))
    assert find_checkpoint(run)[0] == run / "checkpoints" / "step_00000006", "the latest checkpoint is used"
    (run / "pretrain" / "result.json").write_text(json.dumps({"saved": name}))
    with pytest.raises(InputError, match=r"result\.json: is damaged"):
        read_stage_result(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[]"),
        ("metrics.jsonl", '{"step": {}, "val/loss": []}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("status.json", "5"),
        (".hydra/hydra.yaml", "[a"),
        (".hydra/hydra.yaml", "hydra: 1"),
        ("provenance.json", "null"),
        ("config.yaml", "seed: {}"),
    ],
)
def test_compare_refuses_results_of_another_shape(
    name: str, content: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EARLIER, "other")
    (run / name).write_text(content)
    assert run_command(["run", "other", "reports=false", "baseline=critic"], monkeypatch, "compare") in (0, 2)
    assert "Traceback (most" not in capsys.readouterr().err


def test_loading_a_config_reports_every_fault_at_once(run: Path) -> None:
    change_config(run, "model.dim", HUB)
    change_config(run, "tags", [HUB])
    with pytest.raises(ConfigError) as raised:
        load_run_config(run / "config.yaml")
    assert {issue.key.rpartition(" ")[2] for issue in raised.value.issues} == {"model.dim._target_", "tags[0]._target_"}


@pytest.mark.parametrize("key", ["model/..", "model/.", "model//", "model/a\0", "../config.yaml", "/etc/x.yaml"])
def test_keys_of_a_bucket_that_lead_out_of_the_folder_are_ignored(key: str) -> None:
    assert not is_safe_key(key)
    assert is_safe_key("model/tokenizer.json") and is_safe_key(".hydra/accepted.json")
    assert _is_run_file("model/.."), "control: the patterns of a run's files alone accept it"


@pytest.mark.parametrize("number", ["../../elsewhere", "0/../..", None])
def test_the_jobs_of_a_sweep_are_in_its_folder(number: str | None, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [{"number": number, "overrides": ["seed=1"]}]}))
    with pytest.raises(InputError, match=r"sweep\.json: is damaged"):
        SweepState.read(tmp_path)


def test_a_manifest_names_only_files_of_its_checkpoint(run: Path) -> None:
    entry = {"sha256": "a", "bytes": 1}
    for name in ("..", "../a", "/a", "a\0", "manifest.json"):
        content = manifest._add_hash({"format": 1, "step": 1, "files": {name: entry}})
        with pytest.raises(ValueError, match="names files that a checkpoint cannot have"):
            manifest.parse(content)
