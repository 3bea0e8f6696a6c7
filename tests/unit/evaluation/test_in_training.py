"""Tests of samples for held-out problems during training, and of their pass rate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Invoke, tiny_model
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.errors import SandboxUnavailable
from wmtp.evaluation.in_training import SampleEvaluation
from wmtp.sandbox.grader import Program, Verdict


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_validation_samples_the_same_problems_and_the_end_of_training_others(invoke: Invoke) -> None:
    done = invoke("max_steps=6", "eval_interval=2", "num_validation_samples=3", "hydra.run.dir=run")
    assert done.code == 0, done.err
    samples = lines(Path("run/samples.jsonl"))
    by_step: dict[tuple[int, str], list[str]] = {}
    for line in samples:
        by_step.setdefault((line["step"], line["split"]), []).append(line["task_id"])
    assert list(by_step) == [(2, "validation"), (3, "validation"), (4, "validation"), (6, "validation"), (6, "test")]
    *validations, test = by_step.values()
    assert all(tasks == validations[0] and len(set(tasks)) == 3 for tasks in validations)
    assert len(test) == 2 and not set(test) & set(validations[0])
    metrics = [line for line in lines(Path("run/metrics.jsonl")) if "val/loss" in line]
    assert all(line["val/pass_rate"] == 0 for line in metrics)  # nothing was learned yet
    assert {line["outcome"] for line in samples} == {"fail"}


@pytest.mark.slow
def test_a_resumed_run_drops_samples_after_its_checkpoint(invoke: Invoke) -> None:
    options = ["eval_interval=2", "num_validation_samples=2", "num_samples=0"]
    assert invoke("max_steps=6", *options, "hydra.run.dir=uninterrupted").code == 0
    assert invoke("max_steps=4", *options, "hydra.run.dir=run").code == 0
    path = Path("run/samples.jsonl")
    with path.open("a") as file:  # samples after the last checkpoint; the last line is cut off
        file.write(json.dumps({"step": 6, "completion": "of the failed run"}) + "\n" + '{"step": 6, "compl')
    assert invoke("resume=run", "max_steps=6").code == 0
    resumed = [line for line in lines(path) if line["step"] > 4]
    assert len(resumed) == 2
    assert all(line["completion"] != "of the failed run" for line in resumed)


def grade_by_length(program: Program) -> Verdict:
    """Return pass, fail or sandbox error, depending on the program's length."""
    kind = len(program.source) % 3
    outcomes = (("pass", ""), ("fail", "wrong"), ("sandbox error", "isolation"))
    return Verdict(*outcomes[kind], "", 0.0)  # type: ignore[arg-type]


def test_the_pass_rate_excludes_sandbox_errors(tiny_data: Dataset, tmp_path: Path) -> None:
    evaluation = SampleEvaluation(tmp_path, tiny_data, grade_by_length, Processes(), num_validation=8, num_test=4)
    got = evaluation.validate(tiny_model(), 1)
    outcomes = [line["outcome"] for line in lines(tmp_path / "samples.jsonl")]
    assert len(outcomes) == 8
    graded = [outcome for outcome in outcomes if outcome != "sandbox error"]
    assert got["pass_rate"] == graded.count("pass") / len(graded)
    assert 0 < len(graded) < 8  # the control: a rate over all would differ


def test_data_without_a_test_split_have_no_test_samples(tiny_data: Dataset, tmp_path: Path) -> None:
    """Samples for validation problems must not be reported as samples for test problems."""
    for data, expected in ((tiny_data, ["test"] * 4), (replace(tiny_data, test=()), [])):
        (tmp_path / "samples.jsonl").write_text("")
        evaluation = SampleEvaluation(tmp_path, data, grade_by_length, Processes(), num_validation=0, num_test=4)
        assert (evaluation.evaluate_test(tiny_model(), 1) is None) == (not expected)
        assert [line["split"] for line in lines(tmp_path / "samples.jsonl")] == expected


def test_a_correct_solution_passes(tiny_data: Dataset, tmp_path: Path) -> None:
    """The record's own solution is graded like a sample: the correct one passes, the incorrect one fails."""
    from wmtp.evaluation.sampling import build_program
    from wmtp.sandbox.grader import grade
    from wmtp.sandbox.isolation import find_isolation
    from wmtp.sandbox.limits import Limits

    record = tiny_data.test[0]
    wrong = next(r for r in tiny_data.test if r.task_id == record.task_id and not r.is_correct)
    isolation = find_isolation()
    assert grade(build_program(record, record.solution), isolation, Limits()).outcome == "pass"
    assert grade(build_program(record, wrong.solution), isolation, Limits()).outcome == "fail"


@pytest.mark.slow
def test_training_without_a_sandbox_warns_and_has_no_pass_rate(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(choice: str) -> None:
        raise SandboxUnavailable("no namespaces; install bubblewrap")

    monkeypatch.setattr("wmtp.training.builders.find_isolation", raise_unavailable)
    done = invoke("max_steps=2", "num_validation_samples=2", "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert "no val/pass_rate" in done.err
    assert "install bubblewrap" in done.err
    assert "outcome" not in lines(Path("run/samples.jsonl"))[0]
    assert json.loads(Path("run/summary.json").read_text())["pass@1"] is None

    refused = invoke("max_steps=2", "sandbox=bubblewrap")
    assert refused.code == 4
    assert "install bubblewrap" in refused.err


@pytest.mark.slow
def test_unprotected_programs_give_a_warning(invoke: Invoke) -> None:
    done = invoke("max_steps=2", "sandbox=none")
    assert done.code == 0, done.err
    assert "unprotected" in done.err
