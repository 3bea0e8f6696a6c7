"""Tests of the repository: configs compose, presets name their command, and documentation matches the files."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from wmtp.cli.resolve import compose as compose_job
from wmtp.config.schema import CONFIG_FOLDER, PACKAGE, iter_nodes
from wmtp.sweep.grid import parse_grid
from wmtp.train import COMMAND as TRAIN
from wmtp.training.validate import check_training

ROOT = CONFIG_FOLDER.parent
EXPERIMENTS = sorted((CONFIG_FOLDER / "experiment").glob("**/*.yaml"))
CHOSEN_BY_ALGO = ("pretrain=random", "pretrain=shuffled")
"""Their defaults refer to the wrapped algorithm, which Hydra does not allow for an option on the command line."""


def options() -> list[str]:
    """Return every option of every config group as an override."""
    paths = sorted(path.relative_to(CONFIG_FOLDER) for path in CONFIG_FOLDER.glob("*/**/*.yaml"))
    found = [f"{path.parent}={path.stem}" for path in paths if path.stem != "base"]
    found = [override for override in found if not override.startswith(("study=", "study/"))]
    found = [re.sub(r"^experiment/(.*)=", r"experiment=\1/", override) for override in found]
    return [override for override in found if override not in CHOSEN_BY_ALGO]


def with_required_options(override: str) -> list[str]:
    """Return an option together with the options that it requires."""
    group, _, name = override.partition("=")
    companions = {
        "pretrain": [f"algo={name}"] if name not in ("none", "baseline") else [],
        "algo/of": ["algo=random" if name == "reward" else "algo=shuffled"],  # a permutation would change nothing
    }
    return [*companions.get(group, []), override]


@pytest.mark.slow
@pytest.mark.parametrize("override", options())
def test_every_option_composes_and_is_valid_except_for_values_that_a_user_must_set(
    compose: Callable[..., DictConfig], override: str
) -> None:
    issues = check_training(compose(*with_required_options(override))).issues
    expected = {
        "checkpoint.s3.url", "data.path", "hardware.device", "hardware.num_processes", "model.path", "algo.reference",
        "algo.of.reference", "pretrain.start",
    }  # fmt: skip
    assert [issue for issue in issues if issue.key not in expected] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_starts_with_the_command_that_runs_it(path: Path, compose: Callable[..., DictConfig]) -> None:
    name = path.relative_to(CONFIG_FOLDER / "experiment").with_suffix("")
    is_sweep = name.parts[0] == "sweep"
    command, command_text, override = path.read_text().splitlines()[0].partition("python -m wmtp.train ")
    assert (command, command_text) == ("# ", "python -m wmtp.train ")
    assert override == f"{'-m ' if is_sweep else ''}experiment={name}"
    assert is_sweep or compose(override) != compose()


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_job_of_a_preset_sweep_is_valid(path: Path) -> None:
    name = path.relative_to(CONFIG_FOLDER / "experiment").with_suffix("").as_posix()
    jobs = parse_grid("train", [f"experiment={name}"]).jobs
    assert (len(jobs) > 1) == name.startswith("sweep/")
    arms = {tuple(override for override in job if not override.startswith("seed=")): job for job in jobs}
    for job in arms.values() if len(jobs) > 1 else []:
        compose_job(TRAIN, job)


def test_a_preset_may_be_overridden(compose: Callable[..., DictConfig]) -> None:
    config = compose("experiment=smoke", "max_steps=3")
    assert (config.max_steps, config.model.dim) == (3, 64)


def test_every_key_of_the_root_config_has_a_comment() -> None:
    for line in (CONFIG_FOLDER / "train.yaml").read_text().split("\nhydra:")[0].splitlines():
        if re.match(r"^\w+: ", line) and not line.startswith("_target_"):
            assert "#" in line, f"no comment: {line}"
        if re.match(r"^  - \w+", line) and "_self_" not in line:
            assert "#" in line, f"no comment: {line}"


def test_config_variants_are_short() -> None:
    for path in set(CONFIG_FOLDER.glob("*/*.yaml")) - set(CONFIG_FOLDER.glob("study/*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(content, dict)
        if "defaults" in content and "_target_" not in str(content):
            assert len(path.read_text().splitlines()) < 10, path


def test_every_target_is_a_class_of_wmtp_or_torch(compose: Callable[..., DictConfig]) -> None:
    targets = [compose()["_target_"], *(node["_target_"] for _, node in iter_nodes(compose()))]
    assert targets[0] == "wmtp.training.trainer.Trainer"
    assert all(target.startswith(("wmtp.", "torch.optim.")) for target in targets)


def test_the_tree_in_the_readme_matches_the_files() -> None:
    """The tree lists exactly the folders at the top and in `wmtp/`, and the modules of the commands."""
    tree = (ROOT / "README.md").read_text().split("## The code\n")[1].split("\n\nImports point down")[0]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    tracked = [Path(name).parts for name in listed.split()]
    top = {parts[0] for parts in tracked if len(parts) > 1 and not parts[0].startswith(".")}
    packages = {parts[1] for parts in tracked if parts[0] == "wmtp" and len(parts) > 2}
    assert set(re.findall(r"^ {4}(\w+)/", tree, re.MULTILINE)) == top
    assert set(re.findall(r"^ {6}(\w+)/", tree, re.MULTILINE)) == packages
    modules = {parts[1] for parts in tracked if parts[0] == "wmtp" and len(parts) == 2 and parts[1].endswith(".py")}
    assert set(re.findall(r"\w+\.py", tree)) == modules - {"__init__.py"}


def test_packages_have_few_modules() -> None:
    """At most eleven files at the top of `wmtp/`, and at most twenty-one in any of its folders."""
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        assert len(list(folder.glob("*.py"))) <= (11 if folder == PACKAGE else 21), folder


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_has_an_existing_target(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
