"""Solutions token by token, coloured by weight, by loss or by value, with the tokens that are known to matter."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from wmtp.report.html import card, cards, details, joined, quiet, table

Colour = tuple[int, int, int]

TEXT: tuple[Colour, Colour] = (0x14, 0x17, 0x1A), (0xF4, 0xF6, 0xF7)
_NEUTRAL: tuple[Colour, Colour] = (0xF1, 0xF2, 0xF3), (0x26, 0x2B, 0x30)
_ORANGE: tuple[Colour, Colour] = (0xEE, 0x7A, 0x1E), (0xB0, 0x54, 0x00)
_BLUE: tuple[Colour, Colour] = (0x8F, 0xC4, 0xF0), (0x1C, 0x4C, 0x7D)
_PURPLE: tuple[Colour, Colour] = (0xC9, 0x84, 0xC4), (0x8B, 0x3F, 0x86)
_GREEN: tuple[Colour, Colour] = (0x3F, 0xB5, 0x8C), (0x00, 0x69, 0x4D)
"""On light paper and on dark, where text is black and white; each keeps a contrast of 4.5 to it.

Orange stands out more than blue, so that more can be told from less without colours.
"""


@dataclass(frozen=True)
class Measure:
    """What tokens are coloured by: steps of a scale, and a colour for each."""

    name: str
    edges: tuple[float, ...]
    meaning: str
    colours: tuple[tuple[Colour, Colour], ...]

    def step(self, value: float) -> int:
        """On which step of the scale a value lies."""
        return bisect_right(self.edges, value)

    def labels(self) -> list[str]:
        """The steps of the scale in words."""
        inner = [f"{low:.2g} to {high:.2g}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return [f"under {self.edges[0]:.2g}", *inner, f"{self.edges[-1]:.2g} and more"]


def _mixed(end: tuple[Colour, Colour], share: float) -> tuple[Colour, Colour]:
    """Between neutral and a colour, for both papers."""

    def mix(paper: int) -> Colour:
        red, green, blue = (
            round(low + (high - low) * share) for low, high in zip(_NEUTRAL[paper], end[paper], strict=True)
        )
        return red, green, blue

    return mix(0), mix(1)


def _scale(end: tuple[Colour, Colour], steps: int) -> tuple[tuple[Colour, Colour], ...]:
    return tuple(_mixed(end, number / (steps - 1)) for number in range(steps))


MEASURES = (
    Measure(
        "weight", (0.25, 0.5, 0.75, 0.9, 1.11, 1.33, 2.0, 4.0),
        "How much the token counts in the loss. Grey: about as much as the mean, which is 1; blue: less; orange: more.",
        (*reversed(_scale(_BLUE, 5)), *_scale(_ORANGE, 5)[1:]),
    ),
    Measure(
        "loss", (0.05, 0.2, 0.5, 1.0, 2.0, 4.0),
        "How unexpected the token was to head 1, in nats.", _scale(_PURPLE, 7),
    ),
    Measure(
        "value", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "What reward the value head expects after the token: 1 for a right solution, 0 for a wrong one.",
        _scale(_GREEN, 10),
    ),
)  # fmt: skip


def heat_maps(samples: Sequence[Mapping[str, Any]]) -> Markup:
    """The samples, with a switch for what colours them, a legend, and the numbers as tables."""
    shown = [measure for measure in MEASURES if _varies(samples, measure.name)] or [MEASURES[1]]
    switch = joined(
        Markup('<label><input type="radio" name="measure" id="by-{0}"{1}> {0}</label>\n').format(
            measure.name, Markup(" checked") if measure is shown[0] else ""
        )
        for measure in shown
    )
    note = "" if MEASURES[0] in shown else quiet("Every token has the weight 1, so that there is nothing to colour by.")
    return Markup(
        '<div class="tokens">\n{}<fieldset class="switch"><legend>Colour by</legend>\n{}</fieldset>\n{}{}{}</div>\n'
    ).format(note, switch, joined(map(_legend, shown)), _MARKS, cards(map(_sample, samples)))


def style_sheet() -> str:
    """The colours of the steps; only those of the chosen measure hold."""
    rules = [
        f".tokens:has(#by-{measure.name}:checked) .{measure.name[0]}{step}"
        f"{{background:light-dark({_css(light)},{_css(dark)});color:light-dark({_css(TEXT[0])},{_css(TEXT[1])})}}"
        for measure in MEASURES
        for step, (light, dark) in enumerate(measure.colours)
    ]
    others = [
        f".tokens:not(:has(#by-{measure.name}:checked)) .scale-{measure.name}{{display:none}}" for measure in MEASURES
    ]
    return "\n".join([_STYLE, *rules, *others])


def _varies(samples: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a measure is there, and for weights whether they differ."""
    values = {token[name] for sample in samples for token in sample["tokens"] if token.get(name) is not None}
    return len(values) > 1 if name == "weight" else bool(values)


def _legend(measure: Measure) -> Markup:
    steps = joined(
        Markup('<li class="{}{}">{}</li>').format(measure.name[0], step, label)
        for step, label in enumerate(measure.labels())
    )
    return Markup('<div class="scale scale-{}"><p>{}</p><ul>{}</ul></div>\n').format(
        measure.name, measure.meaning, steps
    )


def _sample(sample: Mapping[str, Any]) -> Markup:
    kind, verdict = ("good", "right solution") if sample["is_correct"] else ("bad", "wrong solution")
    tokens = sample["tokens"]
    solution = Markup('<p>{}</p>\n<pre class="solution">{}</pre>\n').format(
        sample["prompt"], joined(map(_token, tokens))
    )
    return card(sample["task_id"], kind, verdict, solution + details("The numbers", _numbers(tokens)))


def _token(token: Mapping[str, Any]) -> Markup:
    classes = [f"{m.name[0]}{m.step(token[m.name])}" for m in MEASURES if token.get(m.name) is not None]
    said = [f"{m.name} {token[m.name]:.3g}" for m in MEASURES if token.get(m.name) is not None]
    if truth := token.get("truth"):
        classes.append(truth)
        said.append(truth)
    text = Markup('<i class="break"></i>\n').join(token["text"].split("\n")) or Markup('<i class="end"></i>')
    return Markup('<span class="{}" title="{}">{}</span>').format(" ".join(classes), ", ".join(said), text)


def _numbers(tokens: Sequence[Mapping[str, Any]]) -> Markup:
    shown = [m.name for m in MEASURES if any(token.get(m.name) is not None for token in tokens)]
    rows = [
        [
            Markup("<code>{}</code>").format(repr(token["text"])[1:-1].replace(" ", "␣") or "end"),
            *("" if token.get(name) is None else f"{token[name]:.3f}" for name in shown),
            token.get("truth") or "",
        ]
        for token in tokens
    ]
    return table(["token", *shown, "known to be"], rows, numbers=range(1, 1 + len(shown)))


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_MARKS = Markup(
    '<p class="marks">Known of the data: <span class="decisive">decisive</span> makes the solution right or wrong; '
    '<span class="noise">noise</span> cannot be predicted.</p>\n'
)
_STYLE = """
.switch { border: 0; padding: 0; margin: 0.8rem 0 0.4rem; display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; }
.switch legend { float: left; padding: 0; margin-right: 1.2rem; color: var(--quiet); }
.scale p { margin: 0.2rem 0 0.4rem; }
.scale ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; font-size: 0.8rem; }
.scale li { padding: 0.1rem 0.55rem; white-space: nowrap; }
.marks { font-size: 0.92rem; }
.decisive { border-bottom: 0.2em solid currentColor; font-weight: 700; }
.noise { border-bottom: 0.2em dotted currentColor; font-style: italic; }
.solution { font-size: 0.9rem; line-height: 1.95; border: 0 !important; padding: 0 !important; }
.solution span { padding: 0.12em 0; box-shadow: inset 1px 0 0 var(--panel);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.break::before { content: "↵"; opacity: 0.75; font-style: normal; font-weight: 400; }
.end::before { content: "end"; font-style: normal; font-size: 0.8em; padding: 0 0.3em; }
@media print { .solution { line-height: 1.7; } }
"""
