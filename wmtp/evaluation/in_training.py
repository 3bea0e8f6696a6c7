"""samples.jsonl: what a run's model answers to held-out problems while it learns, and how many answers pass."""

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
from wmtp.evaluation.sampling import Answer, Judge, answers, encode_prompts, first_records
from wmtp.generation.settings import Decoding
from wmtp.generation.speculation_stats import speculation_metrics
from wmtp.models.mtp import MtpModel, undivided
from wmtp.runtime.atomic_files import drop_lines_after
from wmtp.runtime.processes import num_cores

log = logging.getLogger(__name__)


class HeldOutProblems:
    """Problems that nothing was trained on: some of the validation split, and at the end of the test split.

    The model answers greedily, in the first process; `judge`, where there is one, says which answers pass their tests.
    """

    def __init__(
        self,
        folder: Path,
        data: Dataset,
        judge: Judge | None,
        processes: Processes,
        *,
        num_validation: int,
        num_test: int,
    ) -> None:
        self.path, self.data, self.judge, self.processes = folder / SAMPLES, data, judge, processes
        self.validation = self._fitting("validation", data.validation.records, num_validation)
        self.test = self._fitting("test", data.test or data.validation.records, num_test)

    def forget_after(self, step: int) -> None:
        """Drop what was answered after a step, from which a run goes on."""
        if self.processes.is_main:
            drop_lines_after(self.path, step)

    def validate(self, model: MtpModel, step: int) -> dict[str, float]:
        """Have the validation problems answered; `pass_rate` where they have tests, and `tokens_per_forward`."""
        if not self.validation:
            return {}
        alone = undivided(model, self.processes.is_main)
        return self.processes.from_main(lambda: measured(self._answered(self.validation, alone, step, "validation")))

    def conclude(self, model: MtpModel, step: int) -> dict[str, Any] | None:
        """Have the test problems answered; pass@1 with its interval, None where nothing was judged."""
        if not self.test:
            return None
        alone = undivided(model, self.processes.is_main)

        def passed() -> dict[str, Any] | None:
            outcomes = [outcome == "pass" for outcome in judged(self._answered(self.test, alone, step, "test"))]
            if not outcomes:
                return None
            return {**asdict(estimate([(1, passed) for passed in outcomes], 1)), "problems": len(outcomes)}

        return self.processes.from_main(passed)

    def _answered(self, problems: Sequence[Record], model: MtpModel | None, step: int, split: str) -> list[Answer]:
        assert model is not None
        data = self.data
        decoding = Decoding(max_new_tokens=data.max_new_tokens)
        given = answers(
            model, data.tokenizer, data.template, [(problem, 0) for problem in problems], decoding,
            context=data.max_length, seed=0, judge=self.judge, workers=num_cores(),
        )  # fmt: skip
        order = {problem.task_id: number for number, problem in enumerate(problems)}
        ready = sorted(given, key=lambda answer: order[answer.record.task_id])
        lines = [json.dumps({"step": step, "split": split, **line_of(answer)}) + "\n" for answer in ready]
        with self.path.open("a") as file:
            file.write("".join(lines))
        if errors := sum(a.verdict is not None and a.verdict.outcome == "sandbox error" for a in ready):
            log.warning("%d of %d programs could not be judged, and are left out of the pass rate", errors, len(ready))
        return ready

    def _fitting(self, split: str, records: Sequence[Record], count: int) -> list[Record]:
        """The first problems whose prompts leave room for an answer."""
        if not count:
            return []
        problems = first_records(records)
        prompts = encode_prompts(self.data.tokenizer, self.data.template, [p.prompt for p in problems])
        fitting = [p for p, prompt in zip(problems, prompts, strict=True) if len(prompt) < self.data.max_length]
        if long := len(problems) - len(fitting):
            log.warning("%s: %d prompts are as long as data.max_length and are not answered", split, long)
        return fitting[:count]


def line_of(answer: Answer) -> dict[str, Any]:
    """A line of samples.jsonl, but for when and where it was made."""
    record, verdict = answer.record, answer.verdict
    line = {"task_id": record.task_id, "difficulty": record.difficulty, "prompt": record.prompt}
    line |= {"completion": answer.completion.text}
    if verdict is not None:
        line |= {"outcome": verdict.outcome, "reason": verdict.reason, "detail": verdict.detail}
    return line


def judged(given: Sequence[Answer]) -> list[str]:
    """The outcomes of what was judged; a sandbox that failed says nothing of the answer."""
    return [a.verdict.outcome for a in given if a.verdict is not None and a.verdict.outcome != "sandbox error"]


def measured(given: Sequence[Answer]) -> dict[str, float]:
    """`pass_rate` of the answers that were judged, and what their drafts gave; what cannot be said is left out."""
    outcomes = judged(given)
    passes = {"pass_rate": outcomes.count("pass") / len(outcomes)} if outcomes else {}
    return passes | speculation_metrics([answer.completion.cost for answer in given])
