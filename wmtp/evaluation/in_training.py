"""Sampling during training. Samples are written to samples.jsonl, and the pass rate of their programs is measured."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from wmtp.data.dataset import Dataset
from wmtp.data.records import Record
from wmtp.distributed.process_group import Processes
from wmtp.evaluation.results_log import SAMPLES
from wmtp.evaluation.sampling import Grader, Sample, generate_samples, unique_problems
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import speculation_metrics
from wmtp.models.mtp import MtpModel, unsharded_copy
from wmtp.runtime.json_lines import drop_lines_after
from wmtp.runtime.processes import num_cores
from wmtp.statistics.pass_at_k import estimate

log = logging.getLogger(__name__)

SAMPLE_SEED = 0
"""The seed of all samples. It is not the seed of the run, so that an attempt of a problem gets the same noise at every
validation and in every run."""
ATTEMPT_TEMPERATURE = 1.0
"""The temperature of attempts, at which a model samples from its own distribution."""


class SampleEvaluation:
    """Evaluation on samples: for validation problems at every validation, and for test problems after training.

    Each problem gets a greedy sample, and also `num_attempts` samples at temperature 1, the attempts. If the data set
    has no test split, there are no test problems, because those of the validation split have chosen the checkpoint and
    the time to stop. The main process generates the samples. If there is a `grader`, it grades the samples of problems
    that have tests.
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
        num_attempts: int = 0,
    ) -> None:
        self.path, self.data, self.grader, self.processes = folder / SAMPLES, data, grader, processes
        self.num_attempts = num_attempts
        self.validation_problems = self._select_problems("validation", data.validation.records, num_validation)
        self.test_problems = self._select_problems("test", data.test, num_test)

    def drop_after(self, step: int) -> None:
        """Remove the samples of steps after `step` from samples.jsonl, because a run resumes from `step`."""
        if self.processes.is_main:
            drop_lines_after(self.path, step)

    def validate(self, model: MtpModel, step: int) -> dict[str, float]:
        """Generate samples for each validation problem, and return the samples' metrics (see `sample_metrics`)."""
        if not self.validation_problems:
            return {}
        full = unsharded_copy(model, self.processes.is_main)
        return self.processes.run_on_main(
            lambda: sample_metrics(*self._generate(self.validation_problems, full, step, "validation"))
        )

    def evaluate_test(self, model: MtpModel, step: int) -> dict[str, Any]:
        """Generate samples for each test problem, and return `pass@1` with its interval and the number of problems.

        With attempts, the result also contains `sampled_pass@1`, their mean pass rate over problems, which estimates
        pass@1 at temperature 1. Only graded samples are counted. If there are none, an entry is None.
        """
        if not self.test_problems:
            return pass_at_1_entries([], [], self.num_attempts)
        full = unsharded_copy(model, self.processes.is_main)
        return self.processes.run_on_main(
            lambda: pass_at_1_entries(*self._generate(self.test_problems, full, step, "test"), self.num_attempts)
        )

    def _generate(
        self, problems: Sequence[Record], model: MtpModel | None, step: int, split: str
    ) -> tuple[list[Sample], list[Sample]]:
        """Return the greedy samples and the attempts of all problems, and append both to samples.jsonl."""
        assert model is not None
        greedy = self._sample(model, [(problem, 0) for problem in problems], temperature=0.0)
        keys = [(problem, index) for problem in problems for index in range(self.num_attempts)]
        attempts = self._sample(model, keys, ATTEMPT_TEMPERATURE) if keys else []
        rows = [sample_row(sample) for sample in greedy] + [attempt_row(sample) for sample in attempts]
        with self.path.open("a") as file:
            file.write("".join(json.dumps({"step": step, "split": split, **row}) + "\n" for row in rows))
        samples = [*greedy, *attempts]
        if errors := sum(s.verdict is not None and s.verdict.outcome == "sandbox error" for s in samples):
            log.warning(
                "%d of %d programs could not be graded; they are excluded from the pass rate", errors, len(samples)
            )
        return greedy, attempts

    def _sample(self, model: MtpModel, keys: Sequence[tuple[Record, int]], temperature: float) -> list[Sample]:
        """Return a sample for each pair (problem, sample index), in the order of `keys`."""
        data = self.data
        decoding = Decoding(temperature=temperature, max_new_tokens=data.max_new_tokens)
        generated = generate_samples(
            model, data.tokenizer, data.template, keys, decoding,
            context=data.max_length, seed=SAMPLE_SEED, grader=self.grader, workers=num_cores(),
        )  # fmt: skip
        order = {(problem.task_id, index): number for number, (problem, index) in enumerate(keys)}
        return sorted(generated, key=lambda sample: order[sample.record.task_id, sample.index])

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


def attempt_row(sample: Sample) -> dict[str, Any]:
    """Return the fields of a line of samples.jsonl for an attempt. Lines of greedy samples have no `temperature`."""
    return {"temperature": ATTEMPT_TEMPERATURE, "index": sample.index, **sample_row(sample)}


def pass_counts(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return a pair (number of graded samples, number of passed samples) for each problem with graded samples.

    Sandbox errors do not count as graded.
    """
    passed: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.verdict is not None and sample.verdict.outcome != "sandbox error":
            passed.setdefault(sample.record.task_id, []).append(sample.verdict.outcome == "pass")
    return [(len(each), sum(each)) for each in passed.values()]


def pass_at_1_entries(greedy: Sequence[Sample], attempts: Sequence[Sample], num_attempts: int) -> dict[str, Any]:
    """Return the entry `pass@1` of summary.json and, if `num_attempts` is not 0, the entry `sampled_pass@1`.

    An entry is None if none of its samples was graded.
    """
    counts = {"pass@1": pass_counts(greedy)} | ({"sampled_pass@1": pass_counts(attempts)} if num_attempts else {})
    return {
        name: {**asdict(estimate(each, 1)), "problems": len(each)} if each else None for name, each in counts.items()
    }


def sample_metric_names(num_heads: int, num_attempts: int = 0) -> list[str]:
    """Return the names of the metrics that `sample_metrics` can return.

    Args:
        num_heads: the number of prediction heads.
        num_attempts: the number of attempts for each problem.
    """
    names = ["pass_rate", *(["sampled_pass_rate"] if num_attempts else [])]
    return [*names, "tokens_per_forward", *(f"head_{k}_acceptance" for k in range(2, num_heads + 1))]


def sample_metrics(greedy: Sequence[Sample], attempts: Sequence[Sample] = ()) -> dict[str, float]:
    """Return the mean pass rates over problems, and the metrics of speculative decoding of the greedy samples.

    The metrics `pass_rate` (of the greedy samples) and `sampled_pass_rate` (of the attempts) are left out if none of
    their samples was graded.
    """
    counts = {"pass_rate": pass_counts(greedy), "sampled_pass_rate": pass_counts(attempts)}
    pass_rates = {name: mean(c / n for n, c in each) for name, each in counts.items() if each}
    return pass_rates | speculation_metrics([sample.completion.stats for sample in greedy])
