"""Links of Markdown pages, as GitHub reads them: what a page links to, its anchors, and what the links reach."""

import re
from pathlib import Path

FENCE = re.compile(r"^ *```[\s\S]*?^ *```", re.MULTILINE)
CODE = re.compile(rf"{FENCE.pattern}|`[^`]+`", re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def local_links(markdown: str) -> list[str]:
    """Returns the targets of links and pictures, without those of the web and those inside code."""
    return [target for target in LINK.findall(CODE.sub("", markdown)) if "://" not in target]


def slug(heading: str, separator: str = "-") -> str:
    """Returns GitHub's anchor of a heading: letters, digits and _ in lower case, a hyphen for each space."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", separator)


def anchors(markdown: str) -> set[str]:
    """Returns the anchors of a page; a heading that comes again is numbered."""
    found: dict[str, int] = {}
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", markdown), re.MULTILINE)
    names = [slug(heading) for heading in headings]
    result = set()
    for name in names:
        count = found.get(name, 0)
        found[name] = count + 1
        result.add(f"{name}-{count}" if count else name)
    return result


def reached(root: Path, pages: list[Path]) -> set[Path]:
    """Returns the files that are linked from `pages`, from the pages they link to, and so on, under `root`.

    A link to a folder, or to what does not exist, reaches nothing.
    """
    found, todo = set(pages), list(pages)
    while todo:
        page = todo.pop()
        for link in local_links(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target in found or not target.is_file() or root not in target.parents:
                continue
            found.add(target)
            if target.suffix == ".md":
                todo.append(target)
    return found
