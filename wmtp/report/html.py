"""Functions that create self-contained HTML pages and their elements. They escape all text that is not markup."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from wmtp.report.plots import Plot, to_svg
from wmtp.runtime.atomic_files import replace_atomically

ABSENT = "–"
"""Text of a cell of a table that has no value."""
_NOTHING = Markup()
_STYLE_SHEET = Path(__file__).with_name("page.css")
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header>
{header}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
""")
_SECTION = Markup("""<section id="{name}" aria-labelledby="{name}-title">
<h2 id="{name}-title">{title}</h2>
{body}
</section>
""")
_TABLE = Markup("""<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>
<thead><tr>{}</tr></thead>
<tbody>
{}</tbody>
</table></div>
""")


@dataclass(frozen=True)
class Section:
    """A section of an HTML page. Links to the section use `name` as the anchor."""

    name: str
    title: str
    body: Markup


def write_html(path: Path, title: str, header: Markup, sections: Sequence[Section], style: str = "") -> None:
    """Write an HTML page atomically. The CSS rules in `style` are added to the style sheet that all pages share."""
    content = _PAGE.format(
        title=title,
        style=Markup(_STYLE_SHEET.read_text() + style),
        header=header,
        contents=join(Markup('<li><a href="#{}">{}</a></li>').format(part.name, part.title) for part in sections),
        sections=join(_SECTION.format(name=part.name, title=part.title, body=part.body) for part in sections),
    )
    replace_atomically(path, content.encode())


def join(parts: Iterable[str]) -> Markup:
    """Concatenate texts and return the result as markup. Texts that are not markup are escaped."""
    return Markup("").join(parts)


def paragraph(text: str, css_class: str = "") -> Markup:
    """Return an HTML paragraph with an optional CSS class."""
    return Markup("<p{}>{}</p>\n").format(_class(css_class), text)


def muted_paragraph(text: str) -> Markup:
    """Return an HTML paragraph in a muted color. It is used for remarks and for notes on missing content."""
    return paragraph(text, "quiet")


def figures(plots: Iterable[Plot | None], beside: Markup = _NOTHING) -> Markup:
    """Return a grid of plots, each with its caption.

    Args:
        plots: plots to show. Elements that are None are skipped.
        beside: other content, shown after the last plot in the same grid.
    """
    elements = [
        Markup("<figure>\n{}\n<figcaption>{}</figcaption>\n</figure>\n").format(to_svg(plot), plot.caption)
        for plot in plots
        if plot is not None
    ]
    if beside:
        elements.append(Markup("<div>{}</div>\n").format(beside))
    return Markup('<div class="figures">\n{}</div>\n').format(join(elements)) if elements else Markup()


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
    names: Iterable[int] = (),
) -> Markup:
    """Return an HTML table in a scrollable container.

    Args:
        head: column headings.
        rows: rows of the table. Each row has a cell for each column.
        numbers: indices of the columns whose text is right-aligned.
        wide: indices of the columns in which a line may break at any character.
        names: indices of the columns in which a line may break only between words.
    """
    kinds = dict.fromkeys(numbers, "number") | dict.fromkeys(wide, "wide") | dict.fromkeys(names, "name")
    classes = [_class(kinds.get(column, "")) for column in range(len(head))]
    heads = join(Markup('<th scope="col"{}>{}</th>').format(*pair) for pair in zip(classes, head, strict=True))
    body = join(
        Markup("<tr>{}</tr>\n").format(
            join(Markup("<td{}>{}</td>").format(*pair) for pair in zip(classes, row, strict=True))
        )
        for row in rows
    )
    return _TABLE.format(heads, body)


def bullet_list(texts: Iterable[str]) -> Markup:
    """Return an HTML list with a bullet for each text, or empty markup if there are no texts."""
    entries = join(Markup("<li>{}</li>\n").format(text) for text in texts)
    return Markup("<ul>\n{}</ul>\n").format(entries) if entries else Markup()


def key_numbers(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """Return an HTML list of the most important numbers of a run. Each entry is a tuple (name, value, remark)."""
    return Markup('<dl class="numbers">\n{}</dl>\n').format(
        join(Markup("<div><dt>{}</dt><dd>{}</dd><dd>{}</dd></div>\n").format(*entry) for entry in entries)
    )


def facts(entries: Iterable[tuple[str, Any]]) -> Markup:
    """Return an HTML list of pairs (name, value). Pairs whose value is None or an empty text are left out."""
    return Markup('<dl class="facts">\n{}</dl>\n').format(
        join(
            Markup("<dt>{}</dt><dd>{}</dd>\n").format(name, value) for name, value in entries if value not in (None, "")
        )
    )


def cards(entries: Iterable[Markup]) -> Markup:
    """Return a grid that contains the given cards, which `card` creates."""
    return Markup('<div class="cards">\n{}</div>\n').format(join(entries))


def card(name: str, css_class: str, verdict: str, body: Markup) -> Markup:
    """Return an HTML box with a frame, which contains a name, a verdict and a body.

    Args:
        name: heading of the box.
        css_class: CSS class that colors the verdict: `good`, `bad` or `quiet`.
        verdict: short text beside the heading.
        body: content of the box.
    """
    return Markup(
        '<article class="card"><header><h3>{}</h3><span class="{}">{}</span></header>\n{}</article>\n'
    ).format(name, css_class, verdict, body)


def details(summary: str, body: Markup, *, printed: bool = False, is_open: bool = False) -> Markup:
    """Return an HTML block that the reader of the page can expand and collapse.

    Args:
        summary: text that is always visible.
        body: content that is hidden while the block is collapsed.
        printed: whether the block appears when the page is printed.
        is_open: whether the block is expanded at first.
    """
    return Markup("<details{}{}><summary>{}</summary>\n{}</details>\n").format(
        _class("printed" if printed else "screen"), Markup(" open") if is_open else "", summary, body
    )


def code(text: Any) -> Markup:
    """Return an HTML element that shows a text as inline code."""
    return Markup("<code>{}</code>").format(text)


def breakable(name: str) -> Markup:
    """Return a config key or group label as markup. A line may break after each dot, underscore or equals sign.

    >>> breakable("data.group_tasks=0.5")
    Markup('data.<wbr>group_<wbr>tasks=0.5')
    """
    return Markup("<wbr>").join(re.split(r"(?<=[._=])(?=[^\W\d])", name))


def code_block(text: str) -> Markup:
    """Return an HTML block that shows lines of code."""
    return Markup('<pre class="block">{}</pre>\n').format(text)


def _class(name: str) -> Markup:
    return Markup(' class="{}"').format(escape(name)) if name else Markup()
