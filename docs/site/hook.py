"""mkdocs: pages stand where they are in the repository, so one relative link works on GitHub and on the site.

docs/a.md is the site's docs/a.html. Files outside docs/ that a page links to are part of the site, too: Markdown and
pictures as they are, Python sources as highlighted pages. Pages of the API are made from docstrings.
"""

import sys
from pathlib import Path

from markdown import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
import formulas  # noqa: E402
import links  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IN_NAV, NOT_IN_NAV = InclusionLevel.INCLUDED, InclusionLevel.NOT_IN_NAV


class NoUnderscores(Extension):
    """Emphasis is written with stars: E[μ̃_t | x_t] has none, though an accent ends a word for Python-Markdown."""

    def extendMarkdown(self, md):
        md.delimiters.remove("_")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = links.slug
    config.markdown_extensions.append(NoUnderscores())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by those of the repository that the pages reach, and adds the pages of the API."""
    theirs = [file for file in files if file.src_dir != config.docs_dir]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    own = [ROOT / "docs/site/site.css", *sorted(links.reached(ROOT, pages))]
    repository = [_file(path, config) for path in own]
    api = [_api_page(name, config) for name in _names(config.nav) if name.startswith("api/")]
    return Files([*theirs, *repository, *api])


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Points links to Python sources at their pages."""
    for link in set(links.local_links(markdown)):
        if link.endswith(".py"):
            markdown = markdown.replace(f"]({link})", f"]({link}.md)")
    return markdown


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Sets the formulas, and keeps the functions' code out of the search: their docstrings are in it."""
    html = html.replace(
        '<details class="mkdocstrings-source"', '<details data-search-exclude class="mkdocstrings-source"'
    )
    return formulas.in_html(html)


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".py":
        text = f"---\nsearch:\n  exclude: true\n---\n# `{name}`\n\n```python\n{path.read_text()}```\n"
        return File.generated(config, f"{name}.md", content=text, inclusion=NOT_IN_NAV)
    in_nav = IN_NAV if name in _names(config.nav) or name.startswith("docs/") else NOT_IN_NAV
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=in_nav)


def _api_page(name: str, config: MkDocsConfig) -> File:
    """api/data.levels.md -> the page of diffusion.data.levels."""
    module = f"diffusion.{name.removeprefix('api/').removesuffix('.md')}"
    return File.generated(config, name, content=f"# `{module}`\n\n::: {module}\n")


def _names(nav) -> list[str]:
    """The pages of a nav, in order."""
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [name for item in items for name in _names(item)]
