"""Pages: one HTML file each, that needs nothing else. What comes from a run is escaped wherever it is put in."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from wmtp.report.plots import Drawing, inline
from wmtp.runtime.atomic_files import replace_atomically

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
    """A part of a page under a heading; `name` is its anchor."""

    name: str
    title: str
    body: Markup


def write_page(path: Path, title: str, header: Markup, sections: Sequence[Section], style: str = "") -> None:
    """Write the page in one piece; `style` is put after the style sheet of all pages."""
    content = _PAGE.format(
        title=title,
        style=Markup(_STYLE_SHEET.read_text() + style),
        header=header,
        contents=joined(Markup('<li><a href="#{}">{}</a></li>').format(part.name, part.title) for part in sections),
        sections=joined(_SECTION.format(name=part.name, title=part.title, body=part.body) for part in sections),
    )
    replace_atomically(path, content.encode())


def joined(parts: Iterable[str]) -> Markup:
    """Parts one after the other; what is not markup is escaped."""
    return Markup("").join(parts)


def paragraph(text: str, kind: str = "") -> Markup:
    """A sentence or several."""
    return Markup("<p{}>{}</p>\n").format(_class(kind), text)


def quiet(text: str) -> Markup:
    """A sentence for who would miss what is not there."""
    return paragraph(text, "quiet")


def figures(drawings: Iterable[Drawing | None], beside: Markup = _NOTHING) -> Markup:
    """Drawings, and what else stands beside them, as far as there is room; None is one that had nothing to draw."""
    shown = [
        Markup("<figure>\n{}\n<figcaption>{}</figcaption>\n</figure>\n").format(inline(drawing), drawing.caption)
        for drawing in drawings
        if drawing is not None
    ]
    if beside:
        shown.append(Markup("<div>{}</div>\n").format(beside))
    return Markup('<div class="figures">\n{}</div>\n').format(joined(shown)) if shown else Markup()


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
    names: Iterable[int] = (),
) -> Markup:
    """A table in a container of its own that scrolls.

    Columns of `numbers` stand right; those that are `wide` may break anywhere, those of `names` between words.
    """
    kinds = dict.fromkeys(numbers, "number") | dict.fromkeys(wide, "wide") | dict.fromkeys(names, "name")
    classes = [_class(kinds.get(column, "")) for column in range(len(head))]
    heads = joined(Markup('<th scope="col"{}>{}</th>').format(*pair) for pair in zip(classes, head, strict=True))
    body = joined(
        Markup("<tr>{}</tr>\n").format(
            joined(Markup("<td{}>{}</td>").format(*pair) for pair in zip(classes, row, strict=True))
        )
        for row in rows
    )
    return _TABLE.format(heads, body)


def listed(texts: Iterable[str]) -> Markup:
    """Sentences as a list; nothing where there are none."""
    entries = joined(Markup("<li>{}</li>\n").format(text) for text in texts)
    return Markup("<ul>\n{}</ul>\n").format(entries) if entries else Markup()


def key_numbers(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """The few numbers that matter: what, how much, and what more must be known."""
    return Markup('<dl class="numbers">\n{}</dl>\n').format(
        joined(Markup("<div><dt>{}</dt><dd>{}</dd><dd>{}</dd></div>\n").format(*entry) for entry in entries)
    )


def facts(entries: Iterable[tuple[str, Any]]) -> Markup:
    """Names and what they stand for; entries without a value are left out."""
    return Markup('<dl class="facts">\n{}</dl>\n').format(
        joined(
            Markup("<dt>{}</dt><dd>{}</dd>\n").format(name, value) for name, value in entries if value not in (None, "")
        )
    )


def cards(entries: Iterable[Markup]) -> Markup:
    """Cards beside each other as far as there is room."""
    return Markup('<div class="cards">\n{}</div>\n').format(joined(entries))


def card(name: str, kind: str, verdict: str, body: Markup) -> Markup:
    """What is called so, its verdict, which is `good`, `bad` or `quiet`, and what there is to see."""
    return Markup(
        '<article class="card"><header><h3>{}</h3><span class="{}">{}</span></header>\n{}</article>\n'
    ).format(name, kind, verdict, body)


def details(summary: str, body: Markup, *, printed: bool = False, is_open: bool = False) -> Markup:
    """What is shown when asked for, or from the start; on paper only if it is to be `printed`."""
    return Markup("<details{}{}><summary>{}</summary>\n{}</details>\n").format(
        _class("printed" if printed else "screen"), Markup(" open") if is_open else "", summary, body
    )


def code(text: Any) -> Markup:
    """A word of code."""
    return Markup("<code>{}</code>").format(text)


def breakable(name: str) -> Markup:
    """A key or a label that may be broken before a word after its dots, underscores and equals signs.

    >>> breakable("data.group_tasks=0.5")
    Markup('data.<wbr>group_<wbr>tasks=0.5')
    """
    return Markup("<wbr>").join(re.split(r"(?<=[._=])(?=[^\W\d])", name))


def block(text: str) -> Markup:
    """Lines of code."""
    return Markup('<pre class="block">{}</pre>\n').format(text)


def _class(name: str) -> Markup:
    return Markup(' class="{}"').format(escape(name)) if name else Markup()
