"""What a run shows of its model while it trains: answers to held-out problems, and how many pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Invoke, tiny_model
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.errors import SandboxUnavailable
from wmtp.evaluation.in_training import HeldOutProblems
from wmtp.sandbox.grader import Program, Verdict


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_validation_answers_the_same_problems_and_the_end_others(invoke: Invoke) -> None:
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
def test_a_resumed_run_drops_the_answers_of_the_attempt_that_died(invoke: Invoke) -> None:
    options = ["eval_interval=2", "num_validation_samples=2", "num_samples=0"]
    assert invoke("max_steps=6", *options, "hydra.run.dir=whole").code == 0
    assert invoke("max_steps=4", *options, "hydra.run.dir=run").code == 0
    path = Path("run/samples.jsonl")
    with path.open("a") as file:  # answers after the last checkpoint, the last line cut
        file.write(json.dumps({"step": 6, "completion": "of the dead"}) + "\n" + '{"step": 6, "compl')
    assert invoke("resume=run", "max_steps=6").code == 0
    resumed = [line for line in lines(path) if line["step"] > 4]
    assert len(resumed) == 2
    assert all(line["completion"] != "of the dead" for line in resumed)


def judge_by_length(program: Program) -> Verdict:
    """Passes every second program, and cannot judge some."""
    kind = len(program.source) % 3
    outcomes = (("pass", ""), ("fail", "wrong"), ("sandbox error", "isolation"))
    return Verdict(*outcomes[kind], "", 0.0)  # type: ignore[arg-type]


def test_the_pass_rate_is_that_of_what_was_judged(tiny_data: Dataset, tmp_path: Path) -> None:
    held_out = HeldOutProblems(tmp_path, tiny_data, judge_by_length, Processes(), num_validation=8, num_test=4)
    got = held_out.validate(tiny_model(), 1)
    outcomes = [line["outcome"] for line in lines(tmp_path / "samples.jsonl")]
    assert len(outcomes) == 8
    judged = [outcome for outcome in outcomes if outcome != "sandbox error"]
    assert got["pass_rate"] == judged.count("pass") / len(judged)
    assert 0 < len(judged) < 8  # the control: a rate over all would be another one


def test_a_whole_answer_that_is_right_passes(tiny_data: Dataset, tmp_path: Path) -> None:
    """The record's own solution goes through program, tests and sandbox as an answer does."""
    from wmtp.evaluation.sampling import program_of
    from wmtp.sandbox.grader import judge
    from wmtp.sandbox.isolation import find_isolation
    from wmtp.sandbox.limits import Limits

    record = tiny_data.test[0]
    wrong = next(r for r in tiny_data.test if r.task_id == record.task_id and not r.is_correct)
    isolation = find_isolation()
    assert judge(program_of(record, record.solution), isolation, Limits()).outcome == "pass"
    assert judge(program_of(record, wrong.solution), isolation, Limits()).outcome == "fail"


@pytest.mark.slow
def test_without_a_sandbox_training_goes_on_and_says_what_is_left_out(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(choice: str) -> None:
        raise SandboxUnavailable("no namespaces; install bubblewrap")

    monkeypatch.setattr("wmtp.training.builders.find_isolation", unavailable)
    done = invoke("max_steps=2", "num_validation_samples=2", "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert "no val/pass_rate" in done.err
    assert "install bubblewrap" in done.err
    assert "outcome" not in lines(Path("run/samples.jsonl"))[0]
    assert json.loads(Path("run/summary.json").read_text())["pass@1"] is None

    refused = invoke("max_steps=2", "sandbox=bubblewrap")
    assert refused.code == 4
    assert "install bubblewrap" in refused.err


def test_unprotected_programs_are_announced(invoke: Invoke) -> None:
    done = invoke("max_steps=2", "sandbox=none")
    assert done.code == 0, done.err
    assert "unprotected" in done.err
