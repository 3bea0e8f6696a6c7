"""The record: one correct or incorrect solution to one programming task."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Span = tuple[int, int]
"""A range of characters [start, end) in a solution."""


class StdioTest(BaseModel):
    """A test of a whole program: its standard input and the expected standard output."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stdin: str
    stdout: str


class Record(BaseModel):
    """One solution to a task. Also the schema of a line of plain JSONL.

    `prompt` and `solution` are tokenized separately, so their boundary is exact. `decisive` and `noise` are spans of
    the solution's characters: `decisive` characters determine its correctness, `noise` characters are unpredictable.
    They are the ground truth for comparing weightings, and empty if unknown. A test is an assertion, or an input of the
    whole program and its expected output. `setup` is code that runs after the solution and before its tests. `preamble`
    is code that precedes the solution; together they are a complete program.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task_id: str = Field(min_length=1)
    prompt: str
    solution: str = Field(min_length=1)
    is_correct: bool = True
    difficulty: int | None = Field(default=None, ge=0)
    tests: tuple[str | StdioTest, ...] = ()
    setup: str = ""
    preamble: str = ""
    decisive: tuple[Span, ...] = ()
    noise: tuple[Span, ...] = ()

    @model_validator(mode="after")
    def _check_spans(self) -> "Record":
        for start, end in (*self.decisive, *self.noise):
            if not 0 <= start < end <= len(self.solution):
                length = len(self.solution)
                raise ValueError(f"span [{start}, {end}) is outside the solution of {length} characters")
        return self


class Splits(NamedTuple):
    """The records of the three splits of a data set."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
