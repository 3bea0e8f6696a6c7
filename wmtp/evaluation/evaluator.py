"""One evaluation from its config to its end: answers, verdicts, losses, summary, tracker."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wmtp.config.flatten import flat
from wmtp.config.schema import build
from wmtp.data.records import Record
from wmtp.data.sources import DataSource
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_cache import records_fingerprint
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError, SandboxUnavailable
from wmtp.evaluation.perplexity import prediction_metrics
from wmtp.evaluation.results_log import Journal
from wmtp.evaluation.sampling import Answer, answers, encode_prompts, first_records
from wmtp.evaluation.settings import Evaluation
from wmtp.evaluation.summary import decoding_summary, pass_summary, print_report
from wmtp.evaluation.validate import deciding
from wmtp.generation.settings import Decoding
from wmtp.models.loading import find_checkpoint, load_trained, position_of, read_config, require_room
from wmtp.models.mtp import MtpModel
from wmtp.report.run_report import redraw
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import EVALUATIONS, RUN, is_running, typed
from wmtp.runtime.versions import versions
from wmtp.sandbox.grader import judge
from wmtp.sandbox.isolation import Isolation, find_isolation
from wmtp.tracking.jsonl import FILE_NAME as METRICS
from wmtp.tracking.jsonl import MetricsFile, read_metrics
from wmtp.tracking.mlflow import send_pending

log = logging.getLogger(__name__)


class Evaluator:
    """An evaluation in its folder; what the folder holds already is not done again."""

    def __init__(self, config: DictConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.console = Console(markup=False)
        self.settings: Evaluation = build(config.evaluation)
        self.decoding: Decoding = build(config.generation)
        self.checkpoint, config_path = find_checkpoint(Path(config.checkpoint.path))
        self.run_folder = config_path.parent
        self.cache_dir = Path(config.cache_dir)
        trained = read_config(config_path)
        tokenizer: Tokenizer = build(trained.model.tokenizer, cache_dir=self.cache_dir)
        self.source: DataSource = build(config.data, tokenizer=tokenizer)
        self.split = self.settings.split or ("all" if self.source.is_test_set else "test")
        self.hardware: Hardware = build(config.hardware)

    def evaluate(self) -> float | None:
        """Answer and judge what is missing, measure the losses, and write summary.json; returns the first pass@k.

        Raises:
            InputError: the checkpoint is damaged or of another tokenizer, or there is nothing to evaluate.
            SandboxUnavailable: programs cannot be run safely here, or some could not be judged.
            PendingError: the tracker was not told; everything is on disk.
        """
        started = time.monotonic()
        records = self._records()
        problems = self._problems(records)
        model = load_trained(self.checkpoint, self.source.tokenizer, self.hardware, self.cache_dir)
        require_room(model, self.source.max_length, "data.max_length")
        step, epoch = position_of(self.checkpoint)  # now: a run that is still going may replace its best
        isolation = find_isolation(self.settings.sandbox)
        if isolation.name == "none":
            log.warning("evaluation.sandbox=none: the model's programs run unprotected, with your files and network")
        identity = {**deciding(self.config, self.checkpoint), "records": records_fingerprint(records)}
        journal = Journal(self.folder, flat(identity))
        replace_atomically(self.folder / "config.yaml", OmegaConf.to_yaml(self.config, resolve=True).encode())
        errors = self._judge_missing(journal, problems, model, isolation)
        keys = [(problem.task_id, index) for problem in problems for index in range(self.settings.n)]
        rows = [journal.results[key] for key in keys if key in journal.results]
        summary = {
            "checkpoint": str(self.checkpoint),
            "step": step,
            "epoch": epoch,
            "data": self.source.name,
            "split": self.split,
            **pass_summary(rows, self.settings.k),
            "sandbox_errors": errors,
            "decoding": decoding_summary(rows),
            "prediction": self._prediction(records, model),
            "sandbox": isolation.name,
            "seconds": round(time.monotonic() - started, 1),
            **versions(),
        }
        replace_atomically(self.folder / "summary.json", encode_json(summary))
        print_report(self.console, summary)
        redraw(self.run_folder)
        self._say(f"The results are in {typed(self.folder)}")
        self._track(summary)
        if errors:
            raise SandboxUnavailable(
                f"{errors} programs could not be judged, for reasons that are not theirs (see the log); they count "
                "neither as passed nor as failed. The same command tries them again."
            )
        return next((entry["value"] for entry in summary["pass_at_k"].values()), None)

    def _records(self) -> list[Record]:
        """The records of the chosen split."""
        splits, name = self.source.read(), self.split
        records = [r for part in splits for r in part] if name == "all" else list(getattr(splits, name))
        if not any(record.tests for record in records):
            what = "has no problem with tests" if records else "is empty"
            raise InputError(f"data: the split {name!r} {what}; choose evaluation.split=train, validation, test or all")
        return records

    def _problems(self, records: Sequence[Record]) -> list[Record]:
        """The problems to be solved: those with tests, at most `limit`."""
        source = self.source
        problems = [p for p in first_records(records) if p.tests][: self.settings.limit]
        prompts = encode_prompts(source.tokenizer, source.template, [p.prompt for p in problems])
        sizes = [(len(prompt), p.task_id) for p, prompt in zip(problems, prompts, strict=True)]
        if long := [size for size in sizes if size[0] >= source.max_length]:
            most, task = max(long)
            raise InputError(
                f"data: {len(long)} of {len(problems)} prompts leave no room for an answer in a context of "
                f"{source.max_length} tokens, the longest, {task}, has {most}; set data.max_length={2 * most}, "
                "beyond what the model was trained on"
            )
        return problems

    def _prediction(self, records: Sequence[Record], model: MtpModel) -> dict[str, float]:
        """Losses and accuracies on the right solutions."""
        right = [record for record in records if record.is_correct]
        split = TokenizedSplit("evaluation", right, self.source.whole(), None, self.cache_dir)
        return prediction_metrics(model, split, self.source.tokenizer, self.hardware, self.config.batch_size)

    def _judge_missing(
        self, journal: Journal, problems: Sequence[Record], model: MtpModel, isolation: Isolation
    ) -> int:
        """Answer and judge what the journal lacks; how many programs could not be judged."""
        wanted = journal.missing(problems, self.settings.n)
        source, total = self.source, len(problems) * self.settings.n
        answers_each = f"{self.settings.n} answer{'s' if self.settings.n > 1 else ''} to each"
        self._say(f"{len(problems)} problems of {self.source.name}, {answers_each}; programs run in: {isolation.name}")
        if len(wanted) < total:
            self._say(f"{total - len(wanted)} of {total} answers are there already")
        errors = 0
        with self.hardware.autocast(), progress(self.console, total, total - len(wanted)) as advance:
            for answer in answers(
                model, source.tokenizer, source.template, wanted, self.decoding, context=source.max_length,
                seed=self.settings.seed, workers=self.settings.num_workers,
                judge=partial(judge, isolation=isolation, limits=self.settings.limits),
            ):  # fmt: skip
                if self._could_not_judge(answer):
                    errors += 1
                else:
                    journal.add(answer)
                advance()
        journal.finish(problems)
        return errors

    def _could_not_judge(self, answer: Answer) -> bool:
        """Whether the sandbox failed, and not the program; it is said once for each."""
        assert answer.verdict is not None
        if answer.verdict.outcome != "sandbox error":
            return False
        log.warning("%s, answer %d: %s", answer.record.task_id, answer.index + 1, answer.verdict.detail)
        return True

    def _track(self, summary: dict[str, Any]) -> None:
        """Tell the MLflow run that the model comes from, through a file that its tracker follows."""
        if not any((self.run_folder / name).exists() for name in ("status.json", RUN)):  # a checkpoint by itself
            return
        values = {f"pass_at_{k}": entry["value"] for k, entry in summary["pass_at_k"].items()}
        values |= summary["prediction"] | summary["decoding"]
        named = {f"evaluation/{self._label()}/{name}": value for name, value in values.items()}
        folder = self.run_folder / EVALUATIONS
        try:
            folder.mkdir(exist_ok=True)
            known = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
            if not any(named.items() <= line.items() for line in known):  # a repeated evaluation says nothing new
                file = MetricsFile(folder)
                file.log(summary["step"], summary["epoch"], named)
                file.close("FINISHED")
        except OSError as error:
            log.warning("the run's folder cannot be written, so its MLflow run is not told: %s", error)
            return
        if not is_running(self.run_folder):  # a run that is still going sends them itself
            send_pending(self.run_folder)

    def _label(self) -> str:
        """What was asked, and how, in a word for metrics' names."""
        temperature, num = self.decoding.temperature, self.settings.limit
        how = f"temperature_{temperature:g}" if temperature else "greedy"
        return "-".join([self.source.name, self.split, how, *([f"first_{num}"] if num else [])])

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Callable[[], None]]:
    """Shows how many of the answers are judged: a live bar on a terminal, a line for each tenth elsewhere.

    Gives what is to be called after each.
    """
    if console.is_terminal:
        columns = TextColumn("judged"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    count = done

    def advance() -> None:
        nonlocal count
        count += 1
        if count == total or count % max(1, total // 10) == 0:
            console.print(f"judged {count} of {total}", highlight=False)

    yield advance
