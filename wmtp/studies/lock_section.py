"""The section of a study's page that shows the lock: question, arms, seeds, stop rule, code and data."""

from collections.abc import Sequence

from markupsafe import Markup

from wmtp.report.html import ABSENT, breakable, code, code_block, details, facts, join, paragraph, table
from wmtp.studies.lock import StudyLock
from wmtp.studies.options import StudyOptions


def lock_section(lock: StudyLock) -> Markup:
    """Return the content of a lock as HTML."""
    options = lock.options
    is_intact = "the content matches it" if lock.is_intact else "the content does not match it: the file was changed"
    text = "The lock was written before the first run. Everything that was different later is a departure."
    return (
        paragraph(text)
        + facts([
            ("Question", options.question),
            ("Written", lock.written),
            ("Metric", f"{options.metric}, at the {options.at} model"),
            ("Effect to show", f"{options.effect:g}"),
            ("δ: difference that does not matter", ABSENT if options.delta is None else f"{options.delta:g}"),
            ("Horizons", f"{_numbers(options.horizons)} updates; verdicts are about the longest"),
            ("Search", _describe_search(options)),
            ("Tuning seeds", _numbers(options.tuning_seeds)),
            ("Judging seeds", f"{_numbers(options.judging_seeds)}, used in this order"),
            ("Stop rule", describe_stop_rule(options)),
            ("Code", _revision(lock)),
            ("Hash of the lock", join([code(lock.sha256), f" ({is_intact})"])),
        ])
        + _arms(options)
        + _data(lock)
        + _models(lock)
        + details("Overrides of all runs, preparations and versions", _common(lock), printed=True)
    )  # fmt: skip


def describe_stop_rule(options: StudyOptions) -> str:
    """Return sentences that describe when a study makes a verdict and when it stops."""
    looks = options.looks
    text = f"The first look at the results is after {looks[0]} seeds"
    text += f"; then there is a look after every seed, up to {looks[-1]}. " if len(looks) > 1 else ", the only look. "
    text += "An arm is better or worse as soon as its repeated interval excludes 0. "
    if options.delta is not None:
        text += f"It is the same as soon as its difference is shown to be within ± δ = {options.delta:g}. "
    text += (
        "An arm with a verdict gets no more seeds. The others go on until the seeds are used. The probability of any "
        "false “better” or “worse” in the whole study is at most 5 %"
    )
    text += ", and so is that of any false “the same”" if options.delta is not None else ""
    return text + ", if the differences are not strongly skewed; look at them seed by seed."


def _describe_search(options: StudyOptions) -> str:
    return (
        f"{options.trials} trials for each arm, sampler {options.sampler} with the seed {options.search_seed}, "
        f"{options.tuning_horizon:,} updates"
    )


def _numbers(values: list[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _revision(lock: StudyLock) -> Markup:
    untracked = lock.code.get("untracked", {}).get("files", [])
    text = f", and {len(untracked)} files that git does not track" if untracked else ""
    return join([code(lock.revision or "unknown"), text])


def _arms(options: StudyOptions) -> Markup:
    rows = [
        [
            breakable(label) + (", the baseline" if options.baseline == label != "baseline" else ""),
            code_lines(arm.overrides), code_lines([f"{key}={text}" for key, text in options.space_of(label).items()]),
            f"{arm.updates:g}", ABSENT if arm.stage_1 is None else f"{arm.stage_1:g}",
        ]
        for label, arm in options.arms.items()
    ]  # fmt: skip
    head = ["arm", "overrides", "searched settings", "updates / horizon", "stage 1 / horizon"]
    return table(head, rows, numbers=[3, 4], names=[0])


def code_lines(texts: Sequence[str]) -> Markup | str:
    """Return texts as code with a line for each, or a dash if there are none."""
    return Markup("<br>").join(code(breakable(text)) for text in texts) if texts else ABSENT


def _data(lock: StudyLock) -> Markup:
    """Return a table of the fingerprints of the data, with one row if they are the same for all arms."""
    if not lock.data:
        return Markup()
    kinds = list(dict.fromkeys(kind for each in lock.data.values() for kind in each))
    first = next(iter(lock.data.values()))
    shown = {"all arms": first} if all(each == first for each in lock.data.values()) else lock.data
    rows = [
        [breakable(label), *(code(each[kind][:16]) if kind in each else ABSENT for kind in kinds)]
        for label, each in shown.items()
    ]
    head = ["fingerprints of", *(kind.replace("_", " ") for kind in kinds)]
    return table(head, rows, names=[0])


def _models(lock: StudyLock) -> Markup:
    rows = [[breakable(name), code(sha256[:16])] for name, sha256 in lock.models.items()]
    return table(["preparation", "SHA-256 of its model"], rows, names=[0]) if rows else Markup()


def _common(lock: StudyLock) -> Markup:
    body = code_block("\n".join(lock.options.overrides))
    for name, each in lock.options.preparations.items():
        export = ", then exported with format=hf" if each.export else ""
        body += paragraph(f"Preparation {name}{export}:") + code_block("\n".join(each.overrides))
    if untracked := lock.code.get("untracked", {}).get("files", []):
        body += paragraph(f"Files that git does not track: {', '.join(untracked)}")
    packages = lock.code.get("versions", {})
    return body + paragraph("Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()))
