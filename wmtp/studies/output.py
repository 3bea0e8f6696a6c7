"""Output of the results of a study: tables in the terminal, study.json and study.html."""

from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from wmtp.errors import refuse_odd_content
from wmtp.report.results import comparison_to_dict
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import display_path
from wmtp.studies.page import write_study_page
from wmtp.studies.results import StudyResult
from wmtp.studies.tables import print_study


def write_result(folder: Path, result: StudyResult, console: Console, name: str = "study") -> None:
    """Print the result of a study, and write it to NAME.json and NAME.html in a folder."""
    print_study(console, result)
    replace_atomically(folder / f"{name}.json", encode_json(to_dict(result)))
    with refuse_odd_content(str(folder)):
        write_study_page(folder / f"{name}.html", result)
    console.print(f"The page is {display_path(folder / name)}.html", soft_wrap=True, highlight=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def to_dict(result: StudyResult) -> dict[str, Any]:
    """Return the result of a study as plain types. Numbers that are not finite become None."""
    content: dict[str, Any] = _without_infinities(asdict(replace(result, comparison=None)))
    content["comparison"] = None if result.comparison is None else comparison_to_dict(result.comparison)
    return content
