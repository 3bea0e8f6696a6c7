"""Tests of the wheel, its console scripts, their help texts and shell completion, and of the containers."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TINY, run_command
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.sync import main as sync

ROOT = CONFIG_FOLDER.parent
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = sorted(name.removeprefix("wmtp-") for name in SCRIPTS)
DECOY = "raise SystemExit('a folder named wmtp')"
"""The code of a package `wmtp` in the current folder, which `python -m` imports before the installed one."""
HEAVY_MODULES = ("torch", "transformers", "mlflow", "matplotlib")
"""Modules that take long to import."""
ALL_HELP = f"""
import importlib, sys
for name in {COMMANDS}:
    sys.argv = ["wmtp-" + name, "--help"]
    try:
        sys.exit(importlib.import_module("wmtp." + name).main())
    except SystemExit as error:
        assert error.code == 0, name
    assert not set({HEAVY_MODULES}) & set(sys.modules), name
"""
"""A program that prints the help of each command and checks that no heavy module was imported."""


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with additional environment variables, and return its result."""
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


def test_each_command_has_a_console_script_and_a_module() -> None:
    for name in COMMANDS:
        assert SCRIPTS[f"wmtp-{name}"] == f"wmtp.{name}:main"
        assert callable(importlib.import_module(f"wmtp.{name}").main)
    runnable = {path.stem for path in (ROOT / "wmtp").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert runnable == set(COMMANDS), "python -m wmtp.NAME starts the same commands"


@pytest.fixture
def get_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a function that returns the help text of a command."""

    def help_text(name: str) -> str:
        if name == "sync":
            with pytest.raises(SystemExit):
                sync(["--help"])
        else:
            assert run_command(["--help"], monkeypatch, name) == 0
        return capsys.readouterr().out

    return help_text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_fits_a_terminal(get_help: Callable[[str], str], name: str) -> None:
    text = get_help(name).partition("== Config")[0]
    assert text.count(f"python -m wmtp.{name} ") >= 3
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_explains_each_group_and_its_options(get_help: Callable[[str], str]) -> None:
    text = get_help("train")
    for group in (path for path in CONFIG_FOLDER.iterdir() if path.is_dir()):
        _, _, rest = (get_help("study") if group.name == "study" else text).partition(f"\n{group.name}: ")
        options = [path.stem for path in group.glob("*.yaml") if path.stem != "base"]
        assert options and all(option in rest for option in options), group.name
    assert "smollm2/cpu" in text and "meta_7b/base," not in text
    groups = get_help("generate").partition("== Config")[0].partition("== Groups")[2]
    assert "hardware: " in groups and "algo: " not in groups, "help shows only the groups of the command"


def test_a_python_without_the_packages_gets_one_line_with_the_remedy() -> None:
    """The option -S leaves out the installed packages."""
    for name in COMMANDS:
        done = run([sys.executable, "-S", "-m", f"wmtp.{name}"], ROOT)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and "source .venv/bin/activate" in line
    control = run([sys.executable, "-S", "-c", "import wmtp.cli.runner"], ROOT)
    assert control.returncode == 1 and "ModuleNotFoundError" in control.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_version_is_printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = sync(["--version"]) if name == "sync" else run_command(["--version"], monkeypatch, name)
    first, *packages = capsys.readouterr().out.splitlines()
    assert code == 0 and first.split()[:2] == ["wmtp", version("wmtp")]
    assert f"torch {version('torch')}" in packages


def test_help_says_what_each_key_of_the_chosen_options_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data=jsonl", "algo=critic", "experiment=smoke", "--help"], monkeypatch) == 0
    text = capsys.readouterr().out.partition("== Config")[2]
    for line in (
        "max_steps: 20               # maximum number of updates, regardless of",
        "  dim: 64                   # width of the residual stream",
        '  template: "{prompt}\\n"    # text before the solution',
        "  on_error: stop            # for an invalid line: stop, or skip (counted by",
        "  beta: 0.9                 # temperature; a smaller value spreads the weights",
        "  trains: all               # all: value head, trunk and language model; head:",
        "    patience: 5             # converged: number of measurements without",
    ):
        assert f"\n{line}\n" in text, line


@pytest.mark.slow
def test_help_imports_no_heavy_modules(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", ALL_HELP], tmp_path)
    assert done.returncode == 0, done.stderr
    control = run([sys.executable, "-c", ALL_HELP.replace("'torch'", "'hydra'")], tmp_path)
    assert control.returncode != 0 and "AssertionError" in control.stderr


def test_shell_completion_lists_the_options_of_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_LINE", "wmtp-train scheduler=")
    for shell in ("bash", "zsh", "fish"):
        assert run_command(["-sc", f"query={shell}"], monkeypatch) == 0
        assert capsys.readouterr().out.split() == ["scheduler=constant", "scheduler=cosine", "scheduler=linear"]
        assert run_command(["-sc", f"install={shell}"], monkeypatch) == 0
        assert f"hydra_{shell.replace('zsh', 'bash')}_completion" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bash_completes_the_arguments_of_a_script(tmp_path: Path) -> None:
    script = """
    words=($COMP_LINE); COMP_CWORD=$((${#words[@]} - 1)); COMP_POINT=${#COMP_LINE}
    eval "$(wmtp-train -sc install=bash)"
    complete -p wmtp-train
    hydra_bash_completion; echo "${COMPREPLY[@]}"
    """
    scripts = Path(sys.executable).parent
    done = run(["bash", "--norc", "-c", script], tmp_path, PATH=f"{scripts}:{os.environ['PATH']}",
               COMP_LINE="wmtp-train scheduler=")  # fmt: skip
    registration, *completions = done.stdout.splitlines()
    assert "hydra_bash_completion wmtp-train" in registration
    assert " ".join(completions).split() == ["scheduler=constant", "scheduler=cosine", "scheduler=linear"], done.stderr


def build_package(hook: str, folder: Path) -> Path:
    """Build a distribution with a hook of the build backend, and return its file."""
    code = f"import hatchling.build; print(hatchling.build.{hook}({str(folder)!r}))"
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def source_files(folder: str) -> set[str]:
    """Return the paths of the files in a folder of the repository."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip


@pytest.mark.slow
def test_the_source_distribution_contains_only_the_source(tmp_path: Path) -> None:
    with tarfile.open(build_package("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = source_files("wmtp") | source_files("conf") | source_files("scripts") | source_files("tests")
    assert sources | {"pyproject.toml", "constraints.txt", "LICENSE", ".env.example"} <= names
    assert [name for name in names if name.split("/")[0] in ("outputs", ".venv", ".git", ".env")] == []


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_source(tmp_path: Path) -> None:
    wheel = build_package("build_wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == source_files("wmtp") | {f"wmtp/{name}" for name in source_files("conf")}
    assert "wmtp/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)

    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    done = run(pip, empty)
    assert done.returncode == 0, done.stderr

    def installed_run(*command: str) -> subprocess.CompletedProcess[str]:
        return run(list(command), empty, PYTHONPATH=str(target))

    assert {f"wmtp-{name}" for name in COMMANDS} == {path.name for path in (target / "bin").iterdir()}
    code = (
        "import wmtp, wmtp.config.schema as c, wmtp.runtime.versions as v; "
        "print(wmtp.__file__, c.CONFIG_FOLDER, v.git_revision())"
    )
    found = installed_run(sys.executable, "-c", code).stdout.split()
    assert found == [f"{target}/wmtp/__init__.py", f"{target}/wmtp/conf", "None"]
    (empty / "wmtp").mkdir()
    (empty / "wmtp" / "__init__.py").write_text(DECOY)
    control = installed_run(sys.executable, "-m", "wmtp.train", "--help")
    assert control.returncode == 1 and "named wmtp" in control.stderr
    done = installed_run(str(target / "bin" / "wmtp-train"), *TINY, "dry_run=true", "hardware=cpux2")
    assert done.returncode == 0, done.stderr
    assert "val/loss" in done.stdout and [path.name for path in empty.iterdir()] == ["wmtp"]


def services() -> dict[str, Any]:
    """Return the services in compose.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


def test_files_copied_into_the_containers_exist_and_are_not_ignored() -> None:
    copies = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copies for name in line.split()}
    assert {"wmtp", "conf", "pyproject.toml"} <= names
    assert [name for name in names if not (ROOT / name).exists()] == []
    ignored, *lines = (ROOT / ".dockerignore").read_text().split()
    assert ignored == "*" and {line[1:] for line in lines if line.startswith("!")} == names
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {service["build"]["target"] for service in services().values() if "build" in service} <= set(stages)


def test_packages_are_installed_in_the_image_before_the_code_is_copied(tmp_path: Path) -> None:
    """Otherwise each change of the code would install all packages again."""
    instructions = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text().partition("AS train\n")[2]).splitlines()
    copies = [n for n, line in enumerate(instructions) if re.match(r"COPY (wmtp|conf|README)", line)]
    installs = [n for n, line in enumerate(instructions) if "pip install" in line]
    assert len(installs) == 2 and installs[0] < min(copies) <= max(copies) < installs[1]
    assert "--no-deps" in instructions[installs[1]]
    command = instructions[installs[0]].removeprefix("RUN ").partition(">")[0]
    done = run(["bash", "-c", command.replace("/opt/wmtp", str(ROOT))], tmp_path)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert done.stdout.splitlines() == wanted and len(wanted) > 10, done.stderr


def test_container_secrets_are_variables_listed_in_env_example() -> None:
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert len(named) == 4 and all(f"\n# {name}=" in example for name in named)
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        secret = [name for name in service["environment"] if re.search("PASSWORD|SECRET|KEY", name)]
        assert secret and all(service["environment"][name].startswith("${") for name in secret)


@pytest.mark.slow
def test_the_servers_accept_the_options_in_compose_yaml(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    for name, prefix in (("mlflow", "--"), ("store", "-")):
        program, *rest = services()[name]["command"]
        subcommand = next(word for word in rest if not word.startswith("-"))
        done = run([str(scripts / program), subcommand, "--help" if name == "mlflow" else "-h"], tmp_path)
        text = done.stdout + done.stderr
        options = [word.partition("=")[0] for word in rest[rest.index(subcommand) :] if word.startswith(prefix)]
        assert len(options) > 4 and [o for o in options if not re.search(rf"{re.escape(o)}\b", text)] == []
        assert not re.search(r"--no-such-option\b", text)


@pytest.mark.slow
def test_the_example_of_env_states_the_least_length_of_a_password() -> None:
    from mlflow.exceptions import MlflowException  # mlflow takes seconds to import
    from mlflow.utils.validation import _validate_password

    found = re.search(r"at least (\d+) characters", (ROOT / ".env.example").read_text())
    assert found is not None
    _validate_password("x" * int(found[1]))
    with pytest.raises(MlflowException):
        _validate_password("x" * (int(found[1]) - 1))
