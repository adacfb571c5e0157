"""Small pieces of HTML: the page around the sections, tables, legends. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from openwork.recipes.style import STYLE


def page(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document from (heading, HTML) pairs."""
    body = "\n".join(f"<section><h2>{escape(name)}</h2>{inner}</section>" for name, inner in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{paragraph(subtitle)}\n{body}</main></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A list of (class of the colour, label)."""
    items = "".join(f'<li><span class="key {kind}"></span>{escape(label)}</li>' for kind, label in entries)
    return f'<ul class="legend">{items}</ul>'


def grid(kind: str, figures: Iterable[str]) -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def figure(caption: str, html: str) -> str:
    """A figure around HTML that is escaped already."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{html}</figure>"


def sentence(parts: Iterable[tuple[str, bool]], label: str = "") -> str:
    """A line of text from (text, whether it is marked) pairs, under its label."""
    words = [f"<mark>{escape(text)}</mark>" if is_marked else escape(text) for text, is_marked in parts]
    above = f'<span class="label">{escape(label)}</span>' if label else ""
    return f'<p class="sentence">{above}{" ".join(words)}</p>'
