"""A page that stands alone: one file that asks nothing of a network, and reads on paper too."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

TEXT = {"network", "action", "teacher", "id", "parent", "what", "value"}  # columns of words
GENERATOR = '<meta name="generator" content="jdkd">'  # in every page of ours


def laid_out(title: str, said: Iterable[str], sections: Mapping[str, tuple[str, str]], alarm: str = "") -> str:
    """A page.

    Args:
        title: on top.
        said: what it comes to, in sentences.
        sections: id -> heading and HTML; one without HTML is left out, with its heading.
        alarm: HTML of what makes the rest worthless.
    """
    told = [(name, heading, body) for name, (heading, body) in sections.items() if body]
    return Template(files("jdkd.report").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        verdict="".join(f"<p>{escape(sentence)}</p>" for sentence in said),
        alarm=alarm,
        contents="".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in told),
        sections="\n".join(_section(*section) for section in told),
    )


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>'


def table(headings: Sequence[str], body: Iterable[tuple[Sequence[str], bool]]) -> str:
    """An HTML table, which scrolls by itself where it is too wide.

    Args:
        headings: of the columns; what is text stands on the left.
        body: rows, each with whether it is marked.
    """
    kinds = [' class="text"' if heading in TEXT else "" for heading in headings]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, headings, strict=True))
    lines = []
    for cells, marked in body:
        inner = "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, cells, strict=True))
        opening = '<tr class="marked">' if marked else "<tr>"
        lines.append(f"{opening}{inner}</tr>")
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def made(command: str | Sequence[str], facts: Mapping[str, object]) -> str:
    """How what a page shows was made: the command, and facts by their names, without those that are not known."""
    words = command if isinstance(command, str) else shlex.join(command)
    rows = [([name, str(value)], False) for name, value in facts.items() if value is not None]
    return f"<pre>{escape(words)}</pre>{table(('what', 'value'), rows) if rows else ''}"
