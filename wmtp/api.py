"""Runs and comparisons as pandas frames, for notebooks: `from wmtp import compare, load_runs`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from wmtp.config.flatten import flatten
from wmtp.errors import InputError, refuse_odd_content
from wmtp.report.compare import compare_runs
from wmtp.report.grouping import distinguishing_settings, group_runs
from wmtp.report.measures import measured_values
from wmtp.report.results import BestOrLast, Comparison, MetricComparison
from wmtp.report.run_record import RunRecord, find_runs
from wmtp.report.tokens_to_target import pretrain_tokens
from wmtp.studies.collect import collect_study, is_study

Folder = str | Path


@dataclass(frozen=True)
class Runs:
    """Runs that were read from folders, and their content as frames.

    In all frames, `run` is the folder of a run as text: `runs.metrics.join(runs.runs["state"], on="run")`. A file is
    read when a frame that needs it is first accessed. The folders are those that were given to `load_runs`.
    """

    folders: tuple[Path, ...]
    records: tuple[RunRecord, ...]

    @cached_property
    def groups(self) -> dict[RunRecord, str]:
        """Label of the group of each run. It depends on all loaded runs, that of a comparison on the finished ones."""
        with refuse_odd_content(", ".join(map(str, self.folders))):
            found = group_runs(self.records)
        return {record: label for label, members in found.items() for record in members}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run, with the run as index. Tokens and metrics of unfinished runs are missing.

        The columns are the folder, name, group, seed and state; the settings that differ between the runs; `tokens`, on
        which the run was trained, including `stage_1_tokens`; the validation metrics of the best checkpoint, such as
        `best.val/loss`, and of the last model, such as `last.val/loss`; and measures such as `pass@1`.
        """
        frame = self._concat(lambda record: pd.DataFrame([_describe_run(record)])).set_index("run")
        frame = frame.astype({"tokens": "Int64", "stage_1_tokens": "Int64"})
        settings = _varying_settings(self.records)
        return _columns_first(frame.join(settings), "folder", "name", "group", "seed", "state", *settings.columns)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per number in metrics.jsonl: run, group, seed, stage, step, tokens, metric and value.

        `tokens` counts the tokens of the stage: 1, or 2 for the training of the policy. Non-finite values are kept.
        """
        frame = self._concat(_metrics_of_run)
        return frame.astype({"stage": "int64", "step": "int64", "tokens": "Int64", "value": "float64"})

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per token in tokens.json, which has solutions of the first validation tasks.

        The columns are the run, group and seed; the number of the sample, its `task_id` and `is_correct`; the position
        of the token in the solution and its text; its weight and loss, which are means over heads, and its value; and
        `truth`, which is "decisive", "noise" or missing.
        """
        types = {"sample": "int64", "is_correct": "boolean", "position": "int64"}
        types |= dict.fromkeys(("weight", "loss", "value"), "float64")
        return self._concat(_tokens_of_run).astype(types)

    def _concat(self, frame_of: Callable[[RunRecord], pd.DataFrame]) -> pd.DataFrame:
        """Return the frames of all runs in one frame, which begins with the run, its group and its seed."""
        frames = []
        for record in self.records:
            with refuse_odd_content(record.folder):
                key = {"run": str(record.folder), "group": self.groups[record], "seed": record.seed}
                frames.append(frame_of(record).assign(**key))
        frame = pd.concat([each for each in frames if len(each)] or frames, ignore_index=True)
        return _columns_first(frame, "run", "group", "seed")

    def _repr_html_(self) -> str:
        return str(self.runs._repr_html_())


@dataclass(frozen=True)
class ComparisonFrames:
    """A comparison of groups of runs (arms) with a baseline, as frames."""

    comparison: Comparison
    """The comparison, also with what the frames leave out."""

    @cached_property
    def differences(self) -> pd.DataFrame:
        """One row per metric and arm, with all fields of `wmtp.report.results.Difference` except `pairs`."""
        rows = [_row(metric) | _row(each) for metric in self.comparison.metrics for each in metric.differences]
        return _table(rows, "arm", "metric", "verdict", "mean", "low", "high", "p", "p_holm")

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per metric, arm and seed, with the difference between the arm's run and the baseline's run."""
        return self._by_seed(lambda metric: {each.label: each.pairs for each in metric.differences}, "difference")

    @cached_property
    def values(self) -> pd.DataFrame:
        """One row per metric, arm and seed, with the value of the run. The baseline is one of the arms."""
        return self._by_seed(lambda metric: {each.label: each.values_by_seed for each in metric.groups}, "value")

    @cached_property
    def tokens_to_target(self) -> pd.DataFrame:
        """One row per arm: tokens to reach the baseline's best loss, as a ratio to its tokens. Missing: infinite."""
        return _table(map(_row, self.comparison.tokens_to_target), "arm", "metric", "ratio", "low", "high", "never")

    @cached_property
    def notes(self) -> pd.DataFrame:
        """One row per note, for example on a run that was left out."""
        return pd.DataFrame({"note": self.comparison.notes}, dtype="str")

    def _by_seed(self, numbers: Callable[[MetricComparison], dict[str, dict[int, float]]], name: str) -> pd.DataFrame:
        rows = [(arm, metric.metric, seed, number) for metric in self.comparison.metrics
                for arm, by_seed in numbers(metric).items() for seed, number in by_seed.items()]  # fmt: skip
        return pd.DataFrame(rows, columns=["arm", "metric", "seed", name])

    def _repr_html_(self) -> str:
        return str(self.differences._repr_html_())


def load_runs(*folders: Folder) -> Runs:
    """Return the runs in the given folders and in all folders below them, in any state.

    An `InputError` names a folder that does not exist or contains no run.
    """
    if not folders:
        raise InputError("load_runs() needs the folder of a run, of a sweep, or of several runs")
    paths = tuple(map(Path, folders))
    return Runs(paths, tuple(find_runs(paths)))


def compare(
    runs: Runs | Folder | Iterable[Folder],
    *,
    baseline: str = "baseline",
    metric: str = "val/loss",
    at: BestOrLast = "best",
    delta: float | None = None,
) -> ComparisonFrames:
    """Compare groups of runs with the baseline group, as `python -m wmtp.compare` does, and return frames.

    If `runs` is the folder of a study, its judged runs are compared with the options in its lock.

    Args:
        runs: runs, or folders that contain them.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        metric: for example `val/loss`, `decisive_wrong_auc` or `pass@1`.
        at: model whose validation metrics are compared: "best" for the best checkpoint, "last" for the last model.
        delta: largest difference that does not matter. With it, a verdict can be "the same".
    """
    if at not in get_args(BestOrLast):
        raise InputError(f"at={at}: must be 'best' or 'last'")
    if not isinstance(runs, Runs):
        runs = load_runs(*[runs] if isinstance(runs, Folder) else runs)
    options: Any = {"baseline": baseline, "metric": metric, "at": at, "delta": delta}
    with refuse_odd_content(", ".join(map(str, runs.folders))):
        if [is_study(folder) for folder in runs.folders] == [True]:
            return ComparisonFrames(_compare_study(runs.folders[0], options))
        return ComparisonFrames(compare_runs(runs.records, **options))


def _compare_study(folder: Path, options: Mapping[str, object]) -> Comparison:
    """Return the comparison of a study. Options must have the values of its lock or the defaults of `compare`."""
    result, defaults = collect_study(folder), signature(compare).parameters
    for name, value in options.items():
        if value not in (getattr(result.lock.options, name), defaults[name].default):
            raise InputError(f"{name}={value}: is fixed by the lock of the study in {folder}; leave it out")
    if result.comparison is None:
        command = f"continue: python -m wmtp.study study={result.lock.name} folder={folder}"
        raise InputError("; ".join([f"{folder}: has no runs to compare yet", *result.departures, command]))
    departures = [f"departs from the lock: {each}" for each in result.departures]
    return replace(result.comparison, notes=[*departures, *result.comparison.notes])


def _varying_settings(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Return the chosen options and config values that differ between runs, except the seed, with the run as index."""
    settings = [distinguishing_settings(record) for record in records]  # the chosen options have keys such as "algo="
    rows = [{key[:-1]: option for key, option in each.items() if key.endswith("=")} | flatten(record.config)
            for each, record in zip(settings, records, strict=True)]  # fmt: skip
    frame = pd.DataFrame(rows, [str(record.folder) for record in records]).drop(columns="seed")
    return frame.loc[:, frame.where(frame.notna(), None).map(repr).nunique() > 1]


def _describe_run(record: RunRecord) -> dict[str, Any]:
    """Return the row of a run in the frame `runs`, without its settings."""
    row = {"folder": record.folder, "name": record.name, "state": record.status.get("state")}
    row |= {"tokens": None, "stage_1_tokens": None}
    if record.summary:
        stage_1 = pretrain_tokens(record)
        row |= {"tokens": record.summary["total_tokens"] + stage_1, "stage_1_tokens": stage_1}
    for at in get_args(BestOrLast):
        values = measured_values(record, at).items()
        row |= {f"{at}.{name}" if name.startswith("val/") else name: value for name, value in values}
    return row


def _metrics_of_run(record: RunRecord) -> pd.DataFrame:
    """Return the numbers in both files metrics.jsonl of a run, in long form."""
    stages = {1: pd.DataFrame(record.pretrain_metrics), 2: pd.DataFrame(record.metrics)}
    lines, keys = pd.concat(stages, names=["stage"]).reset_index("stage"), ["stage", "step", "tokens"]
    lines = lines.reindex(columns=[*keys, *lines.columns.drop(keys, errors="ignore")])
    long = lines.melt(id_vars=keys, var_name="metric").dropna(subset="value")
    return long.astype({"value": "float64"})  # "nan" and "inf" are strings in the file


def _tokens_of_run(record: RunRecord) -> pd.DataFrame:
    """Return the tokens in the file tokens.json of a run."""
    names = ["sample", "task_id", "is_correct"]
    samples = [{"sample": number, **sample} for number, sample in enumerate(record.tokens.get("samples", []))]
    frame = pd.json_normalize(samples, "tokens", names, errors="ignore")
    if frame.empty:
        return pd.DataFrame(columns=[*names, "position", "text", "weight", "loss", "value", "truth"])
    frame["position"] = frame.groupby("sample").cumcount()
    return _columns_first(frame, *names, "position")


def _row(item: Any) -> dict[str, Any]:
    """Return the fields of an instance of a data class, without lists and dictionaries; dots join nested names."""
    row: dict[str, Any] = {}
    for name, value in ((field.name, getattr(item, field.name)) for field in fields(item)):
        if is_dataclass(value):
            row |= {f"{name}.{inner}": each for inner, each in _row(value).items()}
        elif not isinstance(value, Mapping | list | tuple | set):
            row[name] = value
    return row


def _table(rows: Iterable[Mapping[str, Any]], *first: str) -> pd.DataFrame:
    """Return rows as a frame that begins with the given columns. Columns without any value become numbers."""
    frame = pd.DataFrame(rows).rename(columns={"label": "arm"})
    if frame.empty:
        return pd.DataFrame(columns=first)
    nested = {name.rpartition(".")[0] for name in frame.columns}  # these have None instead of a data class
    frame = frame.drop(columns=frame.columns.intersection(nested))
    return _columns_first(frame.astype(dict.fromkeys(frame.columns[frame.isna().all()], "float64")), *first)


def _columns_first(frame: pd.DataFrame, *first: str) -> pd.DataFrame:
    known = [name for name in first if name in frame.columns]
    return frame[[*known, *frame.columns.drop(known)]]
