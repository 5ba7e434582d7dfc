"""The frame of every page: head, navigation, and a policy by which a browser loads nothing and runs one script."""

import base64
import hashlib
import json
from importlib import resources
from typing import Any, NamedTuple

from diffusion.reporting.page import embedded
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.markup import Markup, definitions, details, element, section

MAX_RAW_CHARACTERS = 30_000  # of a file that is shown as it is


class Page(NamedTuple):
    """What a page says.

    Attributes:
        title: its heading.
        kicker, lead: the lines above and below the heading.
        cards: the figures to see first.
        notes: what is damaged.
        sections: (identifier, title, content) of each; one without content is left out.
    """

    title: str
    kicker: str
    lead: str
    cards: dict[str, Markup]
    notes: list[str]
    sections: list[tuple[str, str, list[Markup]]]


def render(page: Page) -> str:
    """The HTML file."""
    sections = [section(identifier, title, *content) for identifier, title, content in page.sections]
    shown = [name for name, made in zip(page.sections, sections, strict=True) if made]
    links = [element("li", element("a", title, href=f"#{identifier}")) for identifier, title, _ in shown]
    notes = element("ul", *(element("li", note) for note in page.notes), class_="notes") if page.notes else ""
    header = element(
        "header",
        element("p", page.kicker, class_="kicker"),
        element("h1", page.title),
        element("p", page.lead, class_="lead"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )
    cards = definitions(page.cards, class_="cards") if page.cards else ""
    body = element("body", header, element("main", cards, notes, *sections), element("script", _file("script.js")))
    return f"<!DOCTYPE html>\n{element('html', _head(page.title), body, lang='en')}\n"


def _head(title: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(_file("script.js").encode()).digest()).decode()
    # Whatever a file of the run holds, the browser fetches nothing, and runs no script but the page's own.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", _file("style.css")),
    )


def _file(name: str) -> Markup:
    return Markup(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def plot(contents: Contents, name: str, alt: str, caption: str) -> Markup:
    """A plot that a program left as a PNG file; "" without it."""
    picture = contents.picture(name)
    if picture is None:
        return Markup()
    data, pixels = picture
    shown = embedded.image(pixels, alt, data, embedded.MAX_PLOT_BYTES)
    return element("figure", shown, element("figcaption", caption), class_="plot")


def raw(name: str, value: Any) -> Markup:
    """A JSON file as it is, folded away; "" if there is nothing in it."""
    if not value:
        return Markup()
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    if len(text) > MAX_RAW_CHARACTERS:
        text = f"{text[:MAX_RAW_CHARACTERS]}\n… ({len(text) - MAX_RAW_CHARACTERS:,} more characters in the file)"
    return details(name, element("pre", text))
