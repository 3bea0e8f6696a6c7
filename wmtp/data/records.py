"""The record: one solution, right or wrong, to one programming task."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Span = tuple[int, int]
"""Characters [start, end) of a solution."""


class StdioTest(BaseModel):
    """A test of a whole program: what it must write to standard output, given this standard input."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stdin: str
    stdout: str


class Record(BaseModel):
    """One solution to a task. Also the schema of a line of plain JSONL.

    `prompt` and `solution` are tokenised separately, so their boundary is exact. `decisive` and
    `noise` are spans of the solution's characters known to matter or to be unpredictable: ground
    truth by which weightings are judged. They are empty where nobody knows. A test is an assertion,
    or for whole programs an input and the output it must give; `setup` is code that runs after the
    solution and before its tests; `preamble` is code that the solution continues, before which it is no
    program.
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
    def _spans_lie_in_the_solution(self) -> "Record":
        for start, end in (*self.decisive, *self.noise):
            if not 0 <= start < end <= len(self.solution):
                length = len(self.solution)
                raise ValueError(f"span [{start}, {end}) outside a solution of {length} characters")
        return self


class Splits(NamedTuple):
    """The records of a data set, by what they are used for."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
