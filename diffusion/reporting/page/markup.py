"""HTML in which text cannot become markup: whatever is not `Markup` is escaped where it is put into an element."""

import html
import sys
from collections.abc import Sequence
from typing import Any

VOID = ("img", "input", "link", "meta")  # elements that have no end tag
UNKNOWN = "–"


class Markup(str):
    """HTML that `element` made; plain text is a str."""


def escaped(text: str) -> Markup:
    """Text as HTML; markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def joined(parts: Sequence[str], separator: str = "") -> Markup:
    """Texts and elements one after the other."""
    return Markup(html.escape(separator).join(escaped(part) for part in parts))


def element(name: str, /, *children: str, **attributes: Any) -> Markup:
    """An element with its attributes and children; text among them is escaped.

    Of an attribute's name, class_ stands for class and data_value for data-value. One that is None or False is left
    out, and one that is True has no value.
    """
    start = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        start += f" {key.removesuffix('_').replace('_', '-')}"
        start += "" if value is True else f'="{html.escape(str(value))}"'
    return Markup(f"<{start}>" if name in VOID else f"<{start}>{joined(children)}</{name}>")


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that can be shown: neither NaN nor Inf, no flag."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max  # JSON's integers may be larger


def number(value: Any, form: str = ".4f") -> Markup:
    """A number as `form` prints it; the element keeps it unrounded, for sorting and copying."""
    if not is_number(value):
        return escaped(UNKNOWN)
    return element("data", format(value, form), value=repr(value), title=repr(value))


def with_error(value: Any, error: Any, form: str = ".4f") -> Markup:
    """A number ± its standard error, if it has one."""
    if not is_number(value) or not is_number(error):
        return number(value, form)
    return joined([number(value, form), element("span", " ± ", number(error, form), class_="error")])


def text_of(value: Any) -> str:
    """A value from a JSON file in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text_of(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "(" + ", ".join(map(text_of, value)) + ")"
    return UNKNOWN if value is None else str(value)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, sortable: bool = False, class_: str | None = None
) -> Markup:
    """A table; the first cell of each row is its heading, and a column of numbers is aligned to the right.

    Args:
        head: of every column.
        rows: cells, text or markup.
        caption: what the table shows; read aloud, and seen above it.
        sortable: a click on a column's heading sorts by it.
        class_: of the table element.
    """
    is_numeric = [any(_is_data(row[i]) for row in rows) for i in range(len(head))]

    def cell(i: int, content: str) -> Markup:
        class_ = "number" if is_numeric[i] else None
        return element("td", content, class_=class_) if i else element("th", content, scope="row", class_=class_)

    columns = [
        element("th", text, scope="col", class_="number" if is_numeric[i] else None) for i, text in enumerate(head)
    ]
    body = [element("tr", *(cell(i, content) for i, content in enumerate(row))) for row in rows]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *columns)),
        element("tbody", *body),
        class_=class_,
        data_sortable=sortable,
    )
    return element("div", content, class_="scroll")


def _is_data(cell: str) -> bool:
    return isinstance(cell, Markup) and cell.startswith("<data ")


def definitions(entries: dict[str, str], class_: str | None = None) -> Markup:
    """Names, and what each stands for."""
    pairs = [element("div", element("dt", name), element("dd", value)) for name, value in entries.items()]
    return element("dl", *pairs, class_=class_)


def details(summary: str, *children: str) -> Markup:
    """What is folded away until its summary is clicked."""
    return element("details", element("summary", summary), *children)


def section(identifier: str, title: str, *children: str) -> Markup:
    """A part of the page; "" if it has no content."""
    content = [child for child in children if child]
    return element("section", element("h2", title), *content, id=identifier) if content else Markup()
