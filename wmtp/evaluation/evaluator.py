"""Evaluation of one checkpoint.

An evaluation generates and grades samples, measures losses, writes summary.json, and sends metrics to MLflow.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wmtp.config.flatten import flatten
from wmtp.config.schema import build
from wmtp.data.contents import Contents, content_changes, recorded_contents
from wmtp.data.records import Record
from wmtp.data.sources import DataSource
from wmtp.data.split import build_split
from wmtp.data.token_cache import records_fingerprint
from wmtp.data.token_labels import harmful_tokens, has_token_labels
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError, SandboxUnavailable
from wmtp.evaluation.perplexity import prediction_metrics
from wmtp.evaluation.results_log import ResultsLog
from wmtp.evaluation.sampling import Sample, generate_samples, unique_problems
from wmtp.evaluation.settings import Evaluation
from wmtp.evaluation.summary import decoding_summary, pass_summary, print_report
from wmtp.evaluation.validate import evaluation_identity
from wmtp.generation.settings import Decoding
from wmtp.models.loading import TrainedCheckpoint, check_max_positions
from wmtp.models.mtp import MtpModel
from wmtp.report.run_report import rewrite_report
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.console import Console
from wmtp.runtime.json_lines import read_json_lines
from wmtp.runtime.run_dir import EVALUATIONS, RUN, display_path, is_running
from wmtp.runtime.versions import versions
from wmtp.sandbox.grader import grade
from wmtp.sandbox.isolation import Isolation, find_isolation
from wmtp.tracking.jsonl import FILE_NAME as METRICS
from wmtp.tracking.jsonl import MetricsFile
from wmtp.tracking.mlflow import send_pending

log = logging.getLogger(__name__)


class Evaluator:
    """One evaluation of a checkpoint, with the folder of its results.

    Samples that are already in the folder are not generated again.
    """

    def __init__(
        self, config: DictConfig, folder: Path, checkpoint: TrainedCheckpoint, *, names_data: bool = False
    ) -> None:
        """Create an evaluation.

        Args:
            config: the config of the evaluation.
            folder: the folder of its results.
            checkpoint: the checkpoint to evaluate.
            names_data: whether the user has chosen the data. Then they need not be those of the checkpoint's run.
        """
        self.config, self.folder, self.checkpoint = config, folder, checkpoint
        self.console = Console()
        self.settings: Evaluation = build(config.evaluation)
        self.decoding: Decoding = build(config.generation)
        self.run_folder = checkpoint.run_folder
        self.cache_dir = Path(config.cache_dir)
        self.source: DataSource = build(config.data, tokenizer=checkpoint.tokenizer(self.cache_dir))
        is_test_set = self.source.is_test_set and config.data.path != checkpoint.config.data.get("path")
        self.split = self.settings.split or ("all" if is_test_set else "test")
        self.hardware: Hardware = build(config.hardware)
        self.names_data = names_data
        self.is_run_data: bool | None = None
        """Whether the data have the contents that the run has used. It is None if the run does not record them."""

    def evaluate(self) -> float | None:
        """Generate and grade the samples that are not yet in the folder, measure the losses, and write summary.json.

        Returns:
            The estimate of pass@k for the smallest k in the settings, or None if there is no estimate.

        Raises:
            InputError: the checkpoint is damaged or was trained with another tokenizer, the folder contains another
                evaluation, a prompt is too long, or no problem has tests.
            SandboxUnavailable: no isolation method works on this machine, or some programs could not be graded.
            PendingError: the metrics are on disk, but they could not be sent to MLflow.
        """
        started = time.monotonic()
        records = self._read_records()
        problems = self._select_problems(records)
        model = self.checkpoint.load_model(self.source.tokenizer, self.hardware, self.cache_dir)
        check_max_positions(model, self.source.max_length, "data.max_length")
        step, epoch = self.checkpoint.position  # not later: an active run may replace its best checkpoint
        isolation = find_isolation(self.settings.sandbox)
        if isolation.name == "none":
            log.warning(
                "evaluation.sandbox=none: the model's programs run unprotected, with access to your files and network"
            )
        identity = {**evaluation_identity(self.config, self.checkpoint), "records": records_fingerprint(records)}
        results_log = ResultsLog(self.folder, flatten(identity))
        replace_atomically(self.folder / "config.yaml", OmegaConf.to_yaml(self.config, resolve=True).encode())
        errors = self._grade_missing(results_log, problems, model, isolation)
        keys = [(problem.task_id, index) for problem in problems for index in range(self.settings.n)]
        rows = [results_log.results[key] for key in keys if key in results_log.results]
        summary = {
            "checkpoint": str(self.checkpoint.path),
            "step": step,
            "epoch": epoch,
            "data": self.source.name,
            "source": self.source.origin,
            "is_run_data": self.is_run_data,
            "split": self.split,
            **pass_summary(rows, self.settings.k),
            "sandbox_errors": errors,
            "decoding": decoding_summary(rows),
            "prediction": self._prediction_metrics(records, model),
            "sandbox": isolation.name,
            "seconds": round(time.monotonic() - started, 1),
            **versions(),
        }
        replace_atomically(self.folder / "summary.json", encode_json(summary))
        print_report(self.console, summary)
        rewrite_report(self.run_folder)
        self._print(f"The results are in {display_path(self.folder)}")
        self._log_metrics(summary)
        if errors:
            raise SandboxUnavailable(
                f"{errors} programs could not be graded because the sandbox failed (see the log); they count neither "
                "as passed nor as failed. Run the same command again to grade them."
            )
        return next((entry["value"] for entry in summary["pass_at_k"].values()), None)

    def _read_records(self) -> list[Record]:
        """Return the records of the split that is evaluated.

        Raises:
            InputError: no record of the split has tests, or the data of the run have changed.
        """
        splits, name = self.source.read(), self.split
        self._compare_contents(self.source.contents(splits))
        records = [r for part in splits for r in part] if name == "all" else list(getattr(splits, name))
        if not any(record.tests for record in records):
            problem = "has no problem with tests" if records else "is empty"
            counts = ", ".join(f"{part} {len(records):,}" for part, records in splits._asdict().items())
            raise InputError(f"data: the split {name!r} {problem}; choose another one: evaluation.split=… ({counts})")
        return records

    def _compare_contents(self, contents: Contents) -> None:
        """Compare the contents of the data with those that the run has used, and set `is_run_data`."""
        recorded = recorded_contents(self.run_folder)
        if recorded is None:
            if not self.names_data:
                log.warning("%s does not record its data, so nothing shows whether they have changed", self.run_folder)
            return
        changes = content_changes(recorded, contents)
        self.is_run_data = not changes
        if changes and not self.names_data:
            lines = ["data: they have changed since the run:", *(f"  {change}" for change in changes)]
            remedy = "Restore them, or evaluate on them as other data: name them, for example data=jsonl data.path=…"
            raise InputError("\n".join([*lines, remedy]))

    def _select_problems(self, records: Sequence[Record]) -> list[Record]:
        """Return the problems that have tests. If the setting `limit` is given, return at most that many problems."""
        source = self.source
        problems = [p for p in unique_problems(records) if p.tests][: self.settings.limit]
        prompts = source.tokenizer.encode_prompts(source.template, [p.prompt for p in problems])
        sizes = [(len(prompt), p.task_id) for p, prompt in zip(problems, prompts, strict=True)]
        if too_long := [size for size in sizes if size[0] >= source.max_length]:
            longest, task = max(too_long)
            raise InputError(
                f"data: {len(too_long)} of {len(problems)} prompts leave no room for an answer in a context of "
                f"{source.max_length} tokens; the longest, {task}, has {longest}; set data.max_length={2 * longest}, "
                "which is more than in training"
            )
        return problems

    def _prediction_metrics(self, records: Sequence[Record], model: MtpModel) -> dict[str, float]:
        """Return the model's losses, accuracies and probabilities on the correct solutions among `records`."""
        correct = [record for record in records if record.is_correct]
        tokenizer = self.source.tokenizer
        split = build_split("evaluation", correct, self.source.without_selection(), None, self.cache_dir)
        if has_token_labels(split) and (harmful := harmful_tokens(split, tokenizer)).any():
            split = split.with_columns(harmful=harmful)
        return prediction_metrics(model, split, tokenizer, self.hardware, self.config.batch_size)

    def _grade_missing(
        self, results_log: ResultsLog, problems: Sequence[Record], model: MtpModel, isolation: Isolation
    ) -> int:
        """Generate and grade the samples that the results log does not contain yet.

        Return the number of programs that could not be graded because of a sandbox error.
        """
        missing = results_log.missing(problems, self.settings.n)
        source, total = self.source, len(problems) * self.settings.n
        samples_each = f"{self.settings.n} sample{'s' if self.settings.n > 1 else ''} for each"
        self._print(f"{len(problems)} problems of {self.source.name}, {samples_each}; sandbox: {isolation.name}")
        if len(missing) < total:
            where = f"according to the files in {display_path(self.folder)}; remove this folder to grade all of them"
            self._print(f"{total - len(missing)} of {total} samples are already graded, {where}")
        errors = 0
        with self.hardware.autocast(), show_progress(self.console, total, total - len(missing)) as advance:
            for sample in generate_samples(
                model, source.tokenizer, source.template, missing, self.decoding, context=source.max_length,
                seed=self.settings.seed, workers=self.settings.num_workers,
                grader=partial(grade, isolation=isolation, limits=self.settings.limits),
            ):  # fmt: skip
                if self._is_sandbox_error(sample):
                    errors += 1
                else:
                    results_log.add(sample)
                advance()
        results_log.close(problems)
        return errors

    def _is_sandbox_error(self, sample: Sample) -> bool:
        """Return whether the verdict of a sample is a sandbox error. Log the error if it is."""
        assert sample.verdict is not None
        if sample.verdict.outcome != "sandbox error":
            return False
        log.warning("%s, sample %d: %s", sample.record.task_id, sample.index + 1, sample.verdict.detail)
        return True

    def _log_metrics(self, summary: dict[str, Any]) -> None:
        """Write the metrics of the summary to a file in the run's folder, and send them to MLflow.

        If the run is still active, the metrics are only written, because the run sends them itself.
        """
        if not any((self.run_folder / name).exists() for name in ("status.json", RUN)):  # a checkpoint outside a run
            return
        values = {f"pass_at_{k}": entry["value"] for k, entry in summary["pass_at_k"].items()}
        values |= summary["prediction"] | summary["decoding"]
        named = {f"evaluation/{self._metric_label()}/{name}": value for name, value in values.items()}
        folder = self.run_folder / EVALUATIONS
        try:
            folder.mkdir(exist_ok=True)
            logged = read_json_lines(folder / METRICS)
            if not any(named.items() <= line.items() for line in logged):  # false if the evaluation is repeated
                file = MetricsFile(folder)
                file.log(summary["step"], summary["epoch"], named)
                file.close("FINISHED")
        except OSError as error:
            log.warning("cannot write to the run's folder, so its MLflow run does not get the metrics: %s", error)
            return
        if not is_running(self.run_folder):  # an active run sends them itself
            send_pending(self.run_folder)

    def _metric_label(self) -> str:
        """Return the part of a metric's name that names the data set, the split, the temperature and the `limit`."""
        temperature, limit = self.decoding.temperature, self.settings.limit
        decoding_name = f"temperature_{temperature:g}" if temperature else "greedy"
        name = self.source.name
        if self.is_run_data is False and name == self.checkpoint.config.data.get("shape", "tasks"):
            name = f"other_{name}"  # otherwise the metrics would look like those of the run's data
        return "-".join([name, self.split, decoding_name, *([f"first_{limit}"] if limit else [])])

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


@contextmanager
def show_progress(console: Console, total: int, done: int) -> Iterator[Callable[[], None]]:
    """Show how many samples are graded, either as a bar (on a terminal) or as a line after each tenth of the samples.

    Args:
        console: the console on which the progress is shown.
        total: the number of all samples.
        done: the number of samples that were graded before this call.

    Yields:
        A function that must be called after each graded sample.
    """
    if console.is_terminal:
        columns = TextColumn("graded"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    count = done

    def _advance() -> None:
        """Count one more graded sample, and log a line after each tenth of the samples."""
        nonlocal count
        count += 1
        if count == total or count % max(1, total // 10) == 0:
            console.print(f"graded {count} of {total}", highlight=False)

    yield _advance
