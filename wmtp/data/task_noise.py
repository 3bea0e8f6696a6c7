"""Comments that make the solutions of the generated tasks noisy, and the characters of them that are labelled as noise.

A comment has no effect on a program, so a noisy solution passes and fails the same tests as without its comment.
"""

import random
from dataclasses import dataclass
from typing import Literal, assert_never

from wmtp.data.records import Span

NoiseKind = Literal["footer", "digits", "license"]
DIGITS_PER_LINE = 24
LICENSE = "# Copyright by the authors.\n# All rights reserved.\n# Use at your own risk.\n"
"""The header of the kind `license`. It is always the same, so a model predicts it after a few updates."""


@dataclass(frozen=True)
class Noise:
    """The share of solutions with a comment, and the kinds of comments.

    Each noisy solution gets one comment, whose kind is drawn from `kinds`.

    - `footer`: one line at the end, of which only a random number is labelled as noise.
    - `digits`: `lines` lines of random hexadecimal digits at the end, all of which are noise.
    - `license`: `LICENSE` at the beginning, all of which is noise. In contrast to the other kinds, it is predictable:
      a weighting that excludes the targets with high losses does not find it.
    """

    share: float
    kinds: tuple[NoiseKind, ...] = ("footer",)
    lines: int = 4

    def add(
        self, random_: random.Random, program: str, decisive: tuple[Span, ...]
    ) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
        """Return a program to which a comment may have been added, with its decisive spans and its noise spans.

        The draws from `random_` for `footer` alone determine the data of all runs with the default kinds. Therefore the
        kind is drawn only if there are several.
        """
        if random_.random() >= self.share:
            return program, decisive, ()
        kind = self.kinds[0] if len(self.kinds) == 1 else random_.choice(self.kinds)
        match kind:
            case "footer":
                comment = footer(random_)
                start = len(program) + comment.index(": ") + 2
                return f"{program}{comment}\n", decisive, ((start, len(program) + len(comment)),)
            case "digits":
                text = program + digits(random_, self.lines)
                return text, decisive, ((len(program), len(text)),)
            case "license":
                shift = len(LICENSE)
                return LICENSE + program, tuple((start + shift, end + shift) for start, end in decisive), ((0, shift),)
            case _:
                assert_never(kind)


def footer(random_: random.Random) -> str:
    """Return an unpredictable comment, as in scraped code."""
    match random_.randrange(3):
        case 0:
            return f"# id: {random_.randrange(10**8):08d}"
        case 1:
            year, month, day = random_.randint(2001, 2025), random_.randint(1, 12), random_.randint(1, 28)
            return f"# date: {year}-{month:02d}-{day:02d}"
        case _:
            return f"# hash: {random_.randrange(16**8):08x}"


def digits(random_: random.Random, lines: int) -> str:
    """Return comment lines of random hexadecimal digits, as a binary file that is embedded in code."""
    return "".join(f"# {random_.randrange(16**DIGITS_PER_LINE):0{DIGITS_PER_LINE}x}\n" for _ in range(lines))
