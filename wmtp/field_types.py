"""Annotated types for constructor parameters. They define the range of valid config values."""

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field

Positive = Annotated[int, Field(ge=1)]
"""An integer that is at least 1."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""


def _must_exist(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"does not exist; relative paths start at {Path.cwd()}")
    return path


def _not_empty(path: object) -> object:
    if path == "":
        raise ValueError("is empty; name a file or folder")
    return path


OutputPath = Annotated[Path, BeforeValidator(_not_empty)]
"""The path of a file or folder that is written."""
ABSOLUTE = AfterValidator(Path.absolute)
InputPath = Annotated[Path, BeforeValidator(_not_empty), ABSOLUTE]
"""The path of a file or folder that is read. A config that a run keeps contains its absolute form."""
ExistingPath = Annotated[InputPath, AfterValidator(_must_exist)]
"""An `InputPath` of an existing file or folder."""


def is_input_path(annotation: Any) -> bool:
    """Return whether values of an annotated type may be input paths.

    >>> is_input_path(ExistingPath | None), is_input_path(Path)
    (True, False)
    """
    return any(part is ABSOLUTE or is_input_path(part) for part in get_args(annotation))
