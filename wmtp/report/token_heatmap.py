"""Heatmaps of solutions, in which each token is colored by its weight, loss or predicted value.

Decisive tokens have a solid underline, and noise tokens have a dotted underline.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from wmtp.report.html import card, cards, details, join, muted_paragraph, table

Color = tuple[int, int, int]

TEXT: tuple[Color, Color] = (0x14, 0x17, 0x1A), (0xF4, 0xF6, 0xF7)
_NEUTRAL: tuple[Color, Color] = (0xF1, 0xF2, 0xF3), (0x26, 0x2B, 0x30)
_ORANGE: tuple[Color, Color] = (0xEE, 0x7A, 0x1E), (0xB0, 0x54, 0x00)
_BLUE: tuple[Color, Color] = (0x8F, 0xC4, 0xF0), (0x1C, 0x4C, 0x7D)
_PURPLE: tuple[Color, Color] = (0xC9, 0x84, 0xC4), (0x8B, 0x3F, 0x86)
_GREEN: tuple[Color, Color] = (0x3F, 0xB5, 0x8C), (0x00, 0x69, 0x4D)
"""The constants from `_NEUTRAL` to `_GREEN` are background colors of tokens, each for light mode and for dark mode.

The contrast of each color to the text color of its mode is at least 4.5. Orange stands out more than blue, so that
high weights and low weights can be distinguished without color vision.
"""


@dataclass(frozen=True)
class TokenMetric:
    """A metric by which tokens are colored, with a color for each step of a scale."""

    name: str
    edges: tuple[float, ...]
    meaning: str
    colors: tuple[tuple[Color, Color], ...]

    def step(self, value: float) -> int:
        """Return the index of the scale step that contains a value of the metric."""
        return bisect_right(self.edges, value)

    def labels(self) -> list[str]:
        """Return a label for each step of the scale, which states the range of values of the step."""
        inner = [f"{low:.2g} to {high:.2g}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return [f"under {self.edges[0]:.2g}", *inner, f"{self.edges[-1]:.2g} and more"]


def _mix_with_neutral(end: tuple[Color, Color], share: float) -> tuple[Color, Color]:
    """Return a mixture of the neutral color and the color `end`, for light mode and for dark mode."""

    def _mix(mode: int) -> Color:
        """Return the mixture for one mode (0: light, 1: dark)."""
        red, green, blue = (
            round(low + (high - low) * share) for low, high in zip(_NEUTRAL[mode], end[mode], strict=True)
        )
        return red, green, blue

    return _mix(0), _mix(1)


def _color_scale(end: tuple[Color, Color], steps: int) -> tuple[tuple[Color, Color], ...]:
    return tuple(_mix_with_neutral(end, number / (steps - 1)) for number in range(steps))


TOKEN_METRICS = (
    TokenMetric(
        "weight", (0.25, 0.5, 0.75, 0.9, 1.11, 1.33, 2.0, 4.0),
        "Weight of the token in the loss. Gray: about the mean, which is 1; blue: lower; orange: higher.",
        (*reversed(_color_scale(_BLUE, 5)), *_color_scale(_ORANGE, 5)[1:]),
    ),
    TokenMetric(
        "loss", (0.05, 0.2, 0.5, 1.0, 2.0, 4.0),
        "Cross-entropy of head 1 for the token, in nats.", _color_scale(_PURPLE, 7),
    ),
    TokenMetric(
        "value", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "Reward that the value head predicts after the token: 1 for a right solution, 0 for a wrong one.",
        _color_scale(_GREEN, 10),
    ),
)  # fmt: skip


def token_heatmaps(samples: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the heatmaps of some samples as HTML, with a switch between the metrics and a legend for each metric."""
    metrics = [metric for metric in TOKEN_METRICS if _varies(samples, metric.name)] or [TOKEN_METRICS[1]]
    switch = join(
        Markup('<label><input type="radio" name="measure" id="by-{0}"{1}> {0}</label>\n').format(
            metric.name, Markup(" checked") if metric is metrics[0] else ""
        )
        for metric in metrics
    )
    note = (
        ""
        if TOKEN_METRICS[0] in metrics
        else muted_paragraph("Every token has the weight 1, so tokens are not colored by weight.")
    )
    return Markup(
        '<div class="tokens">\n{}<fieldset class="switch"><legend>Color by</legend>\n{}</fieldset>\n{}{}{}</div>\n'
    ).format(note, switch, join(map(_legend, metrics)), _TRUTH_LEGEND, cards(map(_sample, samples)))


def style_sheet() -> str:
    """Return the CSS rules of the heatmaps. They color the tokens by the metric that is selected in the page."""
    rules = [
        f".tokens:has(#by-{metric.name}:checked) .{metric.name[0]}{step}"
        f"{{background:light-dark({_css_color(light)},{_css_color(dark)});color:light-dark({_css_color(TEXT[0])},{_css_color(TEXT[1])})}}"
        for metric in TOKEN_METRICS
        for step, (light, dark) in enumerate(metric.colors)
    ]
    others = [
        f".tokens:not(:has(#by-{metric.name}:checked)) .scale-{metric.name}{{display:none}}" for metric in TOKEN_METRICS
    ]
    return "\n".join([_STYLE, *rules, *others])


def _varies(samples: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Return whether tokens can be colored by the metric `name`.

    The samples must record the metric. If the metric is the weight, then the weights of the tokens must also differ.
    """
    values = {token[name] for sample in samples for token in sample["tokens"] if token.get(name) is not None}
    return len(values) > 1 if name == "weight" else bool(values)


def _legend(metric: TokenMetric) -> Markup:
    steps = join(
        Markup('<li class="{}{}">{}</li>').format(metric.name[0], step, label)
        for step, label in enumerate(metric.labels())
    )
    return Markup('<div class="scale scale-{}"><p>{}</p><ul>{}</ul></div>\n').format(metric.name, metric.meaning, steps)


def _sample(sample: Mapping[str, Any]) -> Markup:
    kind, verdict = ("good", "right solution") if sample["is_correct"] else ("bad", "wrong solution")
    tokens = sample["tokens"]
    solution = Markup('<p>{}</p>\n<pre class="solution">{}</pre>\n').format(sample["prompt"], join(map(_token, tokens)))
    return card(sample["task_id"], kind, verdict, solution + details("Values as a table", _numbers(tokens)))


def _token(token: Mapping[str, Any]) -> Markup:
    classes = [f"{m.name[0]}{m.step(token[m.name])}" for m in TOKEN_METRICS if token.get(m.name) is not None]
    values = [f"{m.name} {token[m.name]:.3g}" for m in TOKEN_METRICS if token.get(m.name) is not None]
    if truth := token.get("truth"):
        classes.append(truth)
        values.append(truth)
    text = Markup('<i class="break"></i>\n').join(token["text"].split("\n")) or Markup('<i class="end"></i>')
    return Markup('<span class="{}" title="{}">{}</span>').format(" ".join(classes), ", ".join(values), text)


def _numbers(tokens: Sequence[Mapping[str, Any]]) -> Markup:
    names = [m.name for m in TOKEN_METRICS if any(token.get(m.name) is not None for token in tokens)]
    rows = [
        [
            Markup("<code>{}</code>").format(repr(token["text"])[1:-1].replace(" ", "␣") or "end"),
            *("" if token.get(name) is None else f"{token[name]:.3f}" for name in names),
            token.get("truth") or "",
        ]
        for token in tokens
    ]
    return table(["token", *names, "ground truth"], rows, numbers=range(1, 1 + len(names)))


def _css_color(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


_TRUTH_LEGEND = Markup(
    '<p class="marks">Ground truth: <span class="decisive">decisive</span> tokens make the solution right or wrong; '
    '<span class="noise">noise</span> tokens cannot be predicted.</p>\n'
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
