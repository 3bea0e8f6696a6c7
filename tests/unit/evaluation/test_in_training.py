"""Tests of samples for held-out problems during training, and of their pass rate."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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


def grade_by_content(program: Program) -> Verdict:
    """Return pass, fail or sandbox error, depending on the program's text."""
    kind = zlib.crc32(program.source.encode()) % 3
    outcomes = (("pass", ""), ("fail", "wrong"), ("sandbox error", "isolation"))
    return Verdict(*outcomes[kind], "", 0.0)  # type: ignore[arg-type]


def evaluation_with_attempts(data: Dataset, folder: Path, num_attempts: int, **options: Any) -> SampleEvaluation:
    """Return an evaluation of four validation problems and three test problems."""
    folder.mkdir(exist_ok=True)
    options = {"grader": grade_by_content, "processes": Processes(), "num_validation": 4, "num_test": 3} | options
    return SampleEvaluation(folder, data, num_attempts=num_attempts, **options)


def test_the_sampled_pass_rate_is_the_mean_over_problems_of_graded_attempts(tiny_data: Dataset, tmp_path: Path) -> None:
    got = evaluation_with_attempts(tiny_data, tmp_path, 5).validate(tiny_model(), 1)
    samples = lines(tmp_path / "samples.jsonl")
    greedy, attempts = samples[:4], samples[4:]
    assert [line["task_id"] for line in attempts] == [line["task_id"] for line in greedy for _ in range(5)]
    assert [(line["index"], line["temperature"]) for line in attempts] == [(n, 1.0) for n in range(5)] * 4
    assert all("temperature" not in line and "index" not in line for line in greedy)
    by_problem: dict[str, list[bool]] = {}
    for line in attempts:
        if line["outcome"] != "sandbox error":
            by_problem.setdefault(line["task_id"], []).append(line["outcome"] == "pass")
    shares = [sum(passed) / len(passed) for passed in by_problem.values()]
    assert got["sampled_pass_rate"] == pytest.approx(sum(shares) / len(shares))
    pooled = [passed for each in by_problem.values() for passed in each]
    assert len({len(each) for each in by_problem.values()}) > 1
    assert got["sampled_pass_rate"] != pytest.approx(sum(pooled) / len(pooled)), "the control: a mean over attempts"
    outcomes = [line["outcome"] for line in greedy if line["outcome"] != "sandbox error"]
    assert got["pass_rate"] == outcomes.count("pass") / len(outcomes)


@pytest.mark.slow
def test_attempts_do_not_change_other_results_and_are_the_same_at_every_validation(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    none, two, three = (evaluation_with_attempts(tiny_data, tmp_path / str(n), n) for n in (0, 2, 3))
    torch.manual_seed(0)
    alone = none.validate(tiny_model(), 1)
    torch.manual_seed(1)  # the global generator has no influence
    measured = [two.validate(tiny_model(), step) for step in (1, 2)]
    assert measured[0] == measured[1]
    assert {name: value for name, value in measured[0].items() if name != "sampled_pass_rate"} == alone
    three.validate(tiny_model(), 1)
    few, many = ({(line["step"], line["task_id"], line.get("index")): line["completion"] for line in lines(each.path)}
                 for each in (two, three))  # fmt: skip
    assert len(few) == 2 * 4 * 3 and len(many) == 4 * 4
    for (_, task, index), completion in few.items():
        assert many[1, task, index] == completion
    assert len(set(few.values())) == 4 * 3, "the control: attempts of a problem differ from each other"
    assert (tmp_path / "0" / "samples.jsonl").read_text().count("temperature") == 0


def test_attempts_for_test_problems_give_pass_at_1_at_temperature_1(tiny_data: Dataset, tmp_path: Path) -> None:
    evaluation = evaluation_with_attempts(tiny_data, tmp_path, 4)
    found = evaluation.evaluate_test(tiny_model(), 7)
    attempts = [line for line in lines(tmp_path / "samples.jsonl") if "temperature" in line]
    assert len(attempts) == 3 * 4 and {line["split"] for line in attempts} == {"test"}
    shares = {}
    for task in {line["task_id"] for line in attempts}:
        outcomes = [line["outcome"] for line in attempts if line["task_id"] == task]
        if graded := [outcome for outcome in outcomes if outcome != "sandbox error"]:
            shares[task] = graded.count("pass") / len(graded)
    assert found["sampled_pass@1"]["value"] == pytest.approx(sum(shares.values()) / len(shares))
    assert found["sampled_pass@1"]["problems"] == len(shares)


def test_without_a_grader_attempts_are_written_but_have_no_pass_rate(tiny_data: Dataset, tmp_path: Path) -> None:
    evaluation = evaluation_with_attempts(tiny_data, tmp_path, 2, grader=None)
    assert not {"pass_rate", "sampled_pass_rate"} & evaluation.validate(tiny_model(), 1).keys()
    assert evaluation.evaluate_test(tiny_model(), 1) == {"pass@1": None, "sampled_pass@1": None}
    assert len(lines(tmp_path / "samples.jsonl")) == (4 + 3) * 3


@pytest.mark.slow
def test_a_run_that_resumes_drops_later_attempts(tiny_data: Dataset, tmp_path: Path) -> None:
    evaluation = evaluation_with_attempts(tiny_data, tmp_path, 1)
    for step in (2, 4):
        evaluation.validate(tiny_model(), step)
    evaluation.drop_after(2)
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [2] * 8


def test_attempts_without_problems_are_a_mistake(invoke: Invoke) -> None:
    refused = invoke("num_validation_attempts=4")
    assert refused.code == 2
    assert "num_validation_attempts=4: attempts each of num_validation_samples=0" in refused.err
    assert "set num_validation_samples=20, or num_validation_attempts=0" in refused.err
    unmeasured = invoke("early_stopping.monitor=val/sampled_pass_rate", "num_validation_samples=2")
    assert unmeasured.code == 2 and "never measured" in unmeasured.err


@pytest.mark.slow
def test_a_run_can_monitor_its_attempts_and_reports_them_everywhere(invoke: Invoke) -> None:
    options = ["max_steps=4", "eval_interval=2", "num_validation_samples=3", "num_validation_attempts=2", "report=true"]
    done = invoke(*options, "early_stopping.monitor=val/sampled_pass_rate", "hydra.run.dir=run")
    assert done.code == 0, done.err
    metrics = [line for line in lines(Path("run/metrics.jsonl")) if "val/loss" in line]
    names = {"val/sampled_pass_rate", "val/canonical_logprob", "val/canonical_probability"}
    assert all(names <= line.keys() for line in metrics)
    summary = json.loads(Path("run/summary.json").read_text())
    assert names <= summary["last"].keys() and summary["sampled_pass@1"]["problems"] == 2
    for text in ("sampled_pass_rate", "canonical_logprob", "canonical_probability", "sampled_pass@1 0.00 of 2"):
        assert text in done.out
    page = Path("run/report.html").read_text()
    for text in ("pass@1 at temperature 1", "Samples at temperature 1 for the same problems: 0 of 4 pass"):
        assert text in page
    samples = lines(Path("run/samples.jsonl"))
    assert len(samples) == len(metrics) * 3 * 3 + 2 * 3
    assert invoke("resume=run", "max_steps=6", tiny=False).code == 0
    assert lines(Path("run/samples.jsonl"))[: len(metrics) * 9] == samples[: len(metrics) * 9]


def test_data_without_a_test_split_have_no_test_samples(tiny_data: Dataset, tmp_path: Path) -> None:
    """Samples for validation problems must not be reported as samples for test problems."""
    for data, expected in ((tiny_data, ["test"] * 4), (replace(tiny_data, test=()), [])):
        (tmp_path / "samples.jsonl").write_text("")
        evaluation = SampleEvaluation(tmp_path, data, grade_by_length, Processes(), num_validation=0, num_test=4)
        found = evaluation.evaluate_test(tiny_model(), 1)
        assert found.keys() == {"pass@1"} and (found["pass@1"] is None) == (not expected)
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
