"""Tests of values as users type them: numbers, booleans and interpolations are converted, and names may be any text."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.conftest import Invoke, Outcome, run_command
from wmtp.cli.resolve import compose
from wmtp.config import schema
from wmtp.config.overrides import chosen_run_dir, expand_argument
from wmtp.config.values import validate_value
from wmtp.sweep.grid import parse_grid
from wmtp.train import COMMAND as TRAIN

pytestmark = pytest.mark.xdist_group("typed")  # its tests share what one fixture makes

SHORT = ["model=nano", "max_steps=1", "num_samples=1", "num_validation_samples=0", "data.num_train=40",
         "data.num_validation=8", "data.num_test=8", "batch_size=8"]  # fmt: skip
"""Overrides of a run with one update."""
NAME = "数据 (1) = it's [#~]"
"""Name of a folder that neither Hydra nor a shell reads as it is."""


@pytest.mark.slow
def test_the_config_that_runs_contains_the_converted_values(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", "8")
    monkeypatch.setenv("RATE", "1e-3")
    outcome = invoke(
        *SHORT, "algo=critic", "hydra.run.dir=run", "max_steps=1.0", "seed=1e0", "num_samples=1.0", "report=off",
        "batch_size='${oc.env:SIZE}'", "optimizer.lr=${oc.env:RATE}", "optimizer.betas=['0.9',0]", "max_grad_norm=1",
        "run_name=2024_11_29", "pretrain.max_steps=1.0", "pretrain.seed='${oc.env:SIZE}'", "dry_run=no", tiny=False,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert not Path("run/report.html").exists()
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    expected = {"max_steps": 1, "seed": 1, "num_samples": 1, "report": False, "batch_size": 8, "dry_run": False,
                "run_name": "2024_11_29"}  # fmt: skip
    assert repr({key: config[key] for key in expected}) == repr(expected)
    assert repr((config["optimizer"]["lr"], config["optimizer"]["betas"])) == "(0.001, [0.9, 0.0])"
    for stage in (config["pretrain"], yaml.safe_load(Path("run/pretrain/config.yaml").read_text())):
        assert repr((stage["max_steps"], stage["seed"])) == "(1, 8)"
    monkeypatch.setenv("SIZE", "4")
    resumed = compose(TRAIN, ["resume=run", "max_steps=2"])
    assert resumed.checked.issues == [] and resumed.checked.config.batch_size == 8, "a resumed run keeps its values"


def test_control_a_value_that_is_only_checked_ends_the_run_later(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_checked(annotation: object, value: object, key: str, typed: object) -> object:
        """Check a value, and return it as it is."""
        validate_value(annotation, value)
        return value

    monkeypatch.setattr(schema, "convert_value", only_checked)
    assert invoke(*SHORT, "seed=1e0", "num_samples=0").code == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("report=maybe", "report=maybe: must be a valid boolean"),
        ("dry_run=2", "dry_run=2: must be a valid boolean"),
        ("seed=1.5", "seed=1.5: must be a valid integer"),
        ("seed='${oc.env:NOT_SET}'", "Environment variable 'NOT_SET' not found"),
        ("data.path=2024_11_29", "data.path"),
        ("resume=2024_11_29", "resume=2024_11_29: does not exist"),
        ("resume=null", "max_steps"),
        ("hydra.run.dir=''", "hydra.run.dir: is empty; name a folder"),
        ("cache_dir=", "cache_dir: is empty; name a file or folder"),
        ("run_name=a,b", "or write one value as 'run_name='\"'\"'a,b'\"'\"''"),
    ],
)
def test_a_value_that_cannot_be_converted_is_an_error(invoke: Invoke, override: str, message: str) -> None:
    outcome = invoke(override, "max_steps=0")
    assert outcome.code == 2
    assert message in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(("value", "is_dry"), [("yes", True), ("off", False)])
def test_a_dry_run_can_be_requested_in_any_form_of_a_boolean(value: str, is_dry: bool) -> None:
    checked = compose(TRAIN, ["tracking=none", f"dry_run={value}"]).checked
    assert checked.issues == [] and checked.config.dry_run is is_dry
    assert parse_grid("train", ["seed=0,1", f"dry_run={value}"]).is_dry_run is is_dry


def test_interpolations_are_resolved_in_the_chosen_folder_and_kept_where_stage_1_may_change_them() -> None:
    job = compose(TRAIN, ["run_name=mine", "hydra.run.dir=outputs/${run_name}", "algo=random", "seed=2.0"])
    assert chosen_run_dir(job.overrides) == Path("outputs/mine")
    algo = job.checked.config.algo
    assert OmegaConf.is_interpolation(algo, "seed") and repr(algo.seed) == "2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """Return the folder in which a run with the name `NAME` was trained, and what the run printed."""
    home = tmp_path_factory.mktemp("my runs (1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        text: list[str] = []
        patch.setattr("rich.console.Console.print", lambda self, *lines, **options: text.extend(map(str, lines)))
        overrides = ["tracking=none", f"cache_dir={cache}", *SHORT, "report=false", f"hydra.run.dir={NAME}"]
        assert run_command([*overrides, "data.template={prompt}\\n\\n"], patch) == 0
    return home, "\n".join(text)


@pytest.fixture
def paste(trained: tuple[Path, str], invoke: Invoke, tmp_path: Path) -> Callable[[str], Outcome]:
    """Return a function that runs a printed command in a folder that contains the run and its copy `2024_11_29`."""
    shutil.copytree(trained[0] / NAME, tmp_path / NAME)
    shutil.copytree(trained[0] / NAME, tmp_path / "2024_11_29")

    def run(command: str) -> Outcome:
        """Run the command in this process."""
        module, *arguments = shlex.split(command.partition("-m ")[2])
        return invoke(*arguments, command=module.removeprefix("wmtp."), tiny=False)

    return run


@pytest.mark.slow
def test_printed_commands_can_be_pasted(trained: tuple[Path, str], paste: Callable[[str], Outcome]) -> None:
    assert yaml.safe_load((trained[0] / NAME / "config.yaml").read_text())["data"]["template"] == "{prompt}\n\n"
    evaluate, resume = (line for line in trained[1].splitlines() if " -m wmtp." in line)
    for command in (f"{evaluate} evaluation.limit=1", f"{resume} num_samples=0"):
        outcome = paste(command)
        assert outcome.code == 0, (command, outcome.err)
    assert shlex.split(resume)[3:] == [f"resume={NAME}", "max_steps=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "-m wmtp.evaluate checkpoint=2024_11_29 evaluation.limit=1.0 evaluation.k=1.0",
        "-m wmtp.generate checkpoint=2024_11_29 prompt=a n=1.0 generation.max_new_tokens=2",
        f'-m wmtp.generate "checkpoint={NAME}" prompt=a generation.max_new_tokens=8 "generation.stop=[\\n]"',
        f'-m wmtp.export "{NAME}" "out (é)" format=hf_trunk',
        "-m wmtp.train resume=2024_11_29 max_steps=2 num_samples=0",
    ],
)
def test_names_of_runs_may_be_any_text(paste: Callable[[str], Outcome], arguments: str) -> None:
    outcome = paste(arguments)
    assert outcome.code == 0, outcome.err


def test_names_in_sweeps_may_be_any_text() -> None:
    arguments = [f"data.path={NAME}", "seed=0,1", "sweep.arms=[\"'run_name=é (1)'\"]"]
    grid = parse_grid("train", [expand_argument(each, is_sweep=True) for each in arguments])
    assert len(grid.jobs) == 2 and grid.jobs[0][0] == "run_name='é (1)'"
