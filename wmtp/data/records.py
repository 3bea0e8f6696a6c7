"""The schema of a record, which is one correct or incorrect solution to one programming task."""

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

FileName = Annotated[str, Field(pattern=r"^([^/.\x00][^/\x00]{0,254})?$")]
"""The name of a file, without a folder and without a dot at its beginning, or an empty string."""
Span = tuple[int, int]
"""A range of characters [start, end) in a solution."""


SOLUTION_FIELDS = ("solution", "is_correct", "decisive", "noise")
"""Fields of a record that describe its solution. The other fields describe the problem."""


class StdioTest(BaseModel):
    """A test of a whole program. It consists of the standard input and of the expected standard output."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stdin: str
    stdout: str


class Record(BaseModel):
    """One solution to a task. A line of plain JSONL has the same schema.

    `prompt` and `solution` are tokenized separately, so that no token contains characters of both. `decisive` and
    `noise` are lists of character ranges in the solution. The characters in `decisive` determine whether the solution
    is correct. The characters in `noise` do not belong to the program. These two lists are the ground truth for the
    comparison of weightings, and are empty if it is unknown. A test is either an assertion, or a `StdioTest` of the
    whole program. `setup` is code that runs after the solution and before the tests. `preamble` is code before the
    solution; the preamble and the solution together are a complete program.

    Three fields describe how the programs of a contest run. `input_file` is the name of the file from which they read
    the input, and `output_file` the name of the file to which they write the output; both are empty if they use
    standard input and output. `time_limit` is the time limit of the contest for each test, in seconds.
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
    input_file: FileName = ""
    output_file: FileName = ""
    time_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
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
