"""Tests of `python -m wmtp.generate`: prompts, answers on standard output, and errors."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Invoke, run_command

pytestmark = pytest.mark.xdist_group("generate")  # its tests share what one fixture makes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Return the folder of a run with three updates."""
    folder = tmp_path_factory.mktemp("generating") / "run"
    overrides = [
        "tracking=none", f"cache_dir={cache}", f"hydra.run.dir={folder}", "model=nano", "data.num_train=40",
        "data.num_validation=8", "num_samples=0", "num_validation_samples=0", "max_steps=3",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(overrides, patch) == 0
    return folder


def test_the_answer_goes_to_stdout_and_statistics_to_stderr(invoke: Invoke, run: Path) -> None:
    command = [f"checkpoint={run}", "prompt=Write f(x).", "generation.max_new_tokens=12", "generation.temperature=1"]
    done = invoke(*command, command="generate")
    assert done.code == 0, done.err
    assert "12 tokens" in done.err
    assert "tokens_per_forward" in done.err
    assert "tokens" not in done.out
    plain = invoke(*command, "generation.speculative=false", command="generate")
    assert plain.out == done.out


def test_a_prompt_can_be_any_text_and_a_dash_reads_stdin(
    invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'it\'s {a: 1}, [x=${y}] \\\\${z} \\ "=" \n# …'
    options = ["generation.max_new_tokens=8", "generation.temperature=1"]
    from_argument = invoke(f"checkpoint={run}", f"prompt={text}", *options, command="generate")
    assert from_argument.code == 0, from_argument.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + text + "\n"))  # with a byte order mark
    from_stdin = invoke(f"checkpoint={run}", "prompt=-", *options, command="generate")
    assert from_stdin.out == from_argument.out
    monkeypatch.setattr("sys.stdin", io.StringIO("something else\n"))
    assert invoke(f"checkpoint={run}", "prompt=-", *options, command="generate").out != from_argument.out


@pytest.mark.slow
def test_answers_depend_on_the_seed_but_not_on_the_number_of_answers(invoke: Invoke, run: Path) -> None:
    common = [f"checkpoint={run}", "prompt=a", "generation.max_new_tokens=8", "generation.temperature=1"]

    def answers(n: int, *more: str) -> list[str]:
        done = invoke(*common, f"n={n}", *more, command="generate")
        assert done.code == 0, done.err
        parts = done.out.split("--- answer ")[1:]
        return sorted(part.partition("\n")[2] for part in parts) if n > 1 else [done.out]

    four = answers(4)
    assert len(set(four)) == 4
    assert set(answers(3, "generation.batch_size=2")) <= set(four)
    assert answers(1)[0] in four
    assert answers(1, "seed=1")[0] not in four


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt="], "prompt"),
        ([], "prompt: missing"),
        (["prompt=a a a a a a a a a", "context=5"], "leaves no room"),
        (["prompt=a", "n=2", "generation.temperature=0"], "greedy answers are all the same"),
        (["prompt=a", "generation.tmperature=1"], "generation.temperature?"),
    ],
)
def test_invalid_input_is_reported(invoke: Invoke, run: Path, overrides: list[str], message: str) -> None:
    done = invoke(f"checkpoint={run}", *overrides, command="generate")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_an_empty_standard_input_is_refused(invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = invoke(f"checkpoint={run}", "prompt=-", command="generate")
    assert done.code == 2
    assert "prompt: is empty; pass prompt=TEXT, or the text on standard input" in done.err


def test_a_prompt_that_is_not_utf_8_is_refused(invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    done = invoke(f"checkpoint={run}", "prompt=-", command="generate")
    assert done.code == 2
    assert "not UTF-8 text" in done.err


@pytest.mark.slow
def test_the_answer_is_printed_while_it_is_generated(run: Path, cache: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "wmtp.generate", f"checkpoint={run}", f"cache_dir={cache}", "prompt=a",
         "context=4000", "generation.temperature=1", "generation.stop=[]"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.read(1)
        assert process.poll() is None  # generation continues after the first character is printed
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.iterdir())
