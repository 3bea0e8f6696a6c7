"""Sampling during training. Samples are written to samples.jsonl, and the pass rate of their programs is measured."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wmtp.data.dataset import Dataset
from wmtp.data.records import Record
from wmtp.distributed.process_group import Processes
from wmtp.evaluation.pass_at_k import estimate
from wmtp.evaluation.results_log import SAMPLES
from wmtp.evaluation.sampling import Grader, Sample, generate_samples, unique_problems
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import speculation_metrics
from wmtp.models.mtp import MtpModel, unsharded_copy
from wmtp.runtime.json_lines import drop_lines_after
from wmtp.runtime.processes import num_cores

log = logging.getLogger(__name__)


class SampleEvaluation:
    """Evaluation on greedy samples: for validation problems at every validation, and for test problems after training.

    If the data set has no test split, there are no test problems, because those of the validation split have chosen the
    checkpoint and the time to stop. The main process generates the samples. If there is a `grader`, it grades the
    samples of problems that have tests.
    """

    def __init__(
        self,
        folder: Path,
        data: Dataset,
        grader: Grader | None,
        processes: Processes,
        *,
        num_validation: int,
        num_test: int,
    ) -> None:
        self.path, self.data, self.grader, self.processes = folder / SAMPLES, data, grader, processes
        self.validation_problems = self._select_problems("validation", data.validation.records, num_validation)
        self.test_problems = self._select_problems("test", data.test, num_test)

    def drop_after(self, step: int) -> None:
        """Remove the samples of steps after `step` from samples.jsonl, because a run resumes from `step`."""
        if self.processes.is_main:
            drop_lines_after(self.path, step)

    def validate(self, model: MtpModel, step: int) -> dict[str, float]:
        """Generate a sample for each validation problem, and return the samples' metrics (see `sample_metrics`)."""
        if not self.validation_problems:
            return {}
        full = unsharded_copy(model, self.processes.is_main)
        return self.processes.run_on_main(
            lambda: sample_metrics(self._generate(self.validation_problems, full, step, "validation"))
        )

    def evaluate_test(self, model: MtpModel, step: int) -> dict[str, Any] | None:
        """Generate a sample for each test problem, and return pass@1 with its interval and the number of problems.

        Only problems whose sample was graded are counted. If there are none, None is returned.
        """
        if not self.test_problems:
            return None
        full = unsharded_copy(model, self.processes.is_main)

        def _pass_at_1() -> dict[str, Any] | None:
            """Sample the test problems, and return pass@1; None if no sample was graded."""
            outcomes = graded_outcomes(self._generate(self.test_problems, full, step, "test"))
            if not outcomes:
                return None
            return {**asdict(estimate([(1, o == "pass") for o in outcomes], 1)), "problems": len(outcomes)}

        return self.processes.run_on_main(_pass_at_1)

    def _generate(self, problems: Sequence[Record], model: MtpModel | None, step: int, split: str) -> list[Sample]:
        """Generate one sample for each problem, and append the samples to samples.jsonl."""
        assert model is not None
        data = self.data
        decoding = Decoding(max_new_tokens=data.max_new_tokens)
        generated = generate_samples(
            model, data.tokenizer, data.template, [(problem, 0) for problem in problems], decoding,
            context=data.max_length, seed=0, grader=self.grader, workers=num_cores(),
        )  # fmt: skip
        order = {problem.task_id: number for number, problem in enumerate(problems)}
        samples = sorted(generated, key=lambda sample: order[sample.record.task_id])
        lines = [json.dumps({"step": step, "split": split, **sample_row(sample)}) + "\n" for sample in samples]
        with self.path.open("a") as file:
            file.write("".join(lines))
        if errors := sum(s.verdict is not None and s.verdict.outcome == "sandbox error" for s in samples):
            log.warning(
                "%d of %d programs could not be graded; they are excluded from the pass rate", errors, len(samples)
            )
        return samples

    def _select_problems(self, split: str, records: Sequence[Record], count: int) -> list[Record]:
        """Return the first `count` problems, excluding those whose prompts leave no room for a completion."""
        if not count:
            return []
        problems = unique_problems(records)
        prompts = self.data.tokenizer.encode_prompts(self.data.template, [p.prompt for p in problems])
        selected = [p for p, prompt in zip(problems, prompts, strict=True) if len(prompt) < self.data.max_length]
        if long := len(problems) - len(selected):
            log.warning("%s: %d prompts have data.max_length or more tokens and are not sampled", split, long)
        return selected[:count]


def sample_row(sample: Sample) -> dict[str, Any]:
    """Return the fields of a line of samples.jsonl, except `step` and `split`."""
    record, verdict = sample.record, sample.verdict
    row = {"task_id": record.task_id, "difficulty": record.difficulty, "prompt": record.prompt}
    row |= {"completion": sample.completion.text}
    if verdict is not None:
        row |= {"outcome": verdict.outcome, "reason": verdict.reason, "detail": verdict.detail}
    return row


def graded_outcomes(samples: Sequence[Sample]) -> list[str]:
    """Return the outcome of each graded sample, excluding sandbox errors."""
    return [s.verdict.outcome for s in samples if s.verdict is not None and s.verdict.outcome != "sandbox error"]


def sample_metric_names(num_heads: int) -> list[str]:
    """Return the names of the metrics that `sample_metrics` can return for a model with `num_heads` heads."""
    return ["pass_rate", "tokens_per_forward", *(f"head_{k}_acceptance" for k in range(2, num_heads + 1))]


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics of speculative decoding, and also `pass_rate` if at least one sample was graded."""
    outcomes = graded_outcomes(samples)
    pass_rate = {"pass_rate": outcomes.count("pass") / len(outcomes)} if outcomes else {}
    return pass_rate | speculation_metrics([sample.completion.stats for sample in samples])
