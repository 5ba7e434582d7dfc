"""The parts of a page as HTML. Any text that is not `Markup` is escaped."""

import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffusion.reporting.page.contents import Contents

UNKNOWN = "–"
VISIBLE_WIDTH = 640  # screen pixels; small pictures are enlarged up to this width

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
MACROS = TEMPLATES.get_template("parts.html").module


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that can be shown: not NaN, Inf or a bool."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max  # JSON's integers may be larger


def number(value: Any, form: str = ".4f") -> str:
    """A number formatted by `form`. The element also holds it unrounded, for sorting and copying."""
    if not is_number(value):
        return UNKNOWN
    return Markup('<data value="{0}" title="{0}">{1}</data>').format(repr(value), format(value, form))


def with_error(value: Any, error: Any, form: str = ".4f") -> str:
    """A number ± its standard error, if it has one."""
    if not is_number(value) or not is_number(error):
        return number(value, form)
    return Markup('{}<span class="error"> ± {}</span>').format(number(value, form), number(error, form))


def text_of(value: Any) -> str:
    """A value from a JSON file as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text_of(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "(" + ", ".join(map(text_of, value)) + ")"
    return UNKNOWN if value is None else str(value)


def element(tag: str, text: str) -> Markup:
    """A text in an element, such as a paragraph."""
    return Markup(f"<{tag}>{{}}</{tag}>").format(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, sortable: bool = False) -> Markup:
    """A table; the first cell of each row is its heading. If sortable, a click on a column's heading sorts it."""
    return MACROS.table(head, rows, caption, sortable)


def facts(values: dict[str, str], class_: str = "facts") -> str:
    """A list of names and values; "" if it is empty."""
    return MACROS.facts(values, class_) if values else ""


def folded(name: str, value: str | dict[str, Any]) -> str:
    """The text of a file, folded under its name; "" if the file is empty."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return MACROS.folded(name, text) if value else ""


def figure(contents: Contents, name: str, alt: str, caption: str, max_bytes: int, is_plot: bool = False) -> str:
    """A picture from a file, embedded in the page; "" if the file is missing.

    Args:
        alt: a description for those who do not see it; the caption is the line below it.
        max_bytes: larger files are shrunk to this size.
        is_plot: show it unscaled; other pictures are enlarged by an integer factor, with visible pixels.
    """
    picture = contents.picture(name, max_bytes)
    if picture is None:
        return ""
    uri = "data:image/png;base64," + base64.b64encode(picture.png).decode()
    factor = 1 if is_plot else max(1, VISIBLE_WIDTH // picture.width)
    size = picture.width * factor, picture.height * factor
    return MACROS.figure(uri, alt, caption, *size, class_="plot" if is_plot else "pixels")


def render(
    title: str,
    kicker: str,
    lead: str,
    cards: dict[str, str],
    problems: list[str],
    sections: list[tuple[str, str, list[str]]],
) -> str:
    """The HTML file.

    Args:
        title: the heading; the kicker and the lead are the lines above and below it.
        cards: the main numbers, by name.
        problems: a line about each file that could not be read.
        sections: (identifier, title, parts) of each; sections without parts are left out.
    """
    style, script = (TEMPLATES.loader.get_source(TEMPLATES, name)[0] for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [(identifier, name, [part for part in parts if part]) for identifier, name, parts in sections]
    return TEMPLATES.get_template("page.html").render(
        title=title,
        kicker=kicker,
        lead=lead,
        cards=cards,
        problems=problems,
        sections=[section for section in sections if section[2]],
        style=Markup(style),
        script=Markup(script),
        # Whatever the files of the run hold, the browser fetches nothing and runs only the page's own script.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
