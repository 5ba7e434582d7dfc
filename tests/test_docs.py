"""docs/: links and anchors exist, the site's contents name every page, and formulas are typeset."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from diffusion.experiment import config as config_lib
from diffusion.experiment import other_likelihood, rules

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def module_of_the_site(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = module_of_the_site("links")
formulas = module_of_the_site("formulas")
REACHED = sorted(path for path in links.reached(ROOT, PAGES) if path.suffix == ".md")


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links.local_links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        # A folder is a page on GitHub, but not on the site.
        if not target.is_file() or anchor and anchor not in links.anchors(target.read_text()):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", REACHED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page)


@pytest.mark.parametrize("page", REACHED, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_configs_and_keys_that_the_program_accepts(page):
    """Those of main.py that name a config. tests/test_extending.py runs the command of extending.md."""
    text = page.read_text().replace("\\\n", " ") * (page.name != "extending.md")
    for command in re.findall(r"python main\.py (--config=configs/[^`\n]*)", text):
        flags = dict(flag.partition("=")[::2] for flag in shlex.split(command, comments=True) if "$" not in flag)
        overrides = {name[9:]: value for name, value in flags.items() if name.startswith("--config.")}
        config = config_lib.from_file(str(ROOT / flags["--config"]), overrides)
        config_lib.check(config)
        rules.check(config)
        if flags.get("--mode") == "eval":
            other_likelihood.alone(config)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# A title: β̃_t, in `code`\n\n## Twice\n\n## Twice\n\n```\n# no title\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md) ![2](none.png) [3](b.md#twice-1) [4](b.md#twice-2) [5](#own) `[6](code)` [f](.)\n"
        "```\n[7](code)\n```\n[8](b.md#no-title) [9](https://example.org/none)\n\n# Own\n"
    )
    assert broken_links(page) == ["none.png", "b.md#twice-2", ".", "b.md#no-title"]


def test_pages_reached_are_those_of_linked_pages_too(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("[b](deep/b.md#x) [folder](deep) [gone](gone.md)")
    (tmp_path / "deep" / "b.md").write_text("[back](../a.md) ![c](c.png) [outside](../../d.md)")
    (tmp_path / "deep" / "c.png").touch()
    found = links.reached(tmp_path, [tmp_path / "a.md"])
    assert {path.relative_to(tmp_path).as_posix() for path in found} == {"a.md", "deep/b.md", "deep/c.png"}


def nav_names() -> list[str]:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [name for group in nav for pages in group.values() for page in pages for name in page.values()]


def test_the_contents_name_every_page_once():
    names = nav_names()
    assert len(names) == len(set(names))
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES}
    assert pages <= set(names), "add these to nav of mkdocs.yml"
    assert all((ROOT / name).exists() for name in names if not name.startswith("api/"))


def test_the_contents_name_every_module_of_the_paper_and_no_other_than_exist():
    modules = {name.removeprefix("api/").removesuffix(".md") for name in nav_names() if name.startswith("api/")}
    paper = {path.stem for path in (ROOT / "diffusion").glob("*.py")} - {"__init__"}
    assert paper <= modules, "add these to nav of mkdocs.yml, as api/NAME.md"
    for module in modules:
        path = ROOT / "diffusion" / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("q(x_{t−1} | x_t, x_0)", "q(x<sub>t−1</sub> | x<sub>t</sub>, x<sub>0</sub>)"),
        ("A_t²/(2β̃_t)", "A<sub>t</sub>²/(2β̃<sub>t</sub>)"),
        (
            "√ᾱ_t x0_i, SNR_{t−1}, Σ_{t=2}^T",
            "√ᾱ<sub>t</sub> x0<sub>i</sub>, SNR<sub>t−1</sub>, Σ<sub>t=2</sub><sup>T</sup>",
        ),
        ("2^−bound(x) dx_0", "2<sup>−bound</sup>(x) dx<sub>0</sub>"),
        ("E_{q(x_{1:T})}, σ*_t, e^(λ/2)", "E<sub>q(x<sub>1:T</sub>)</sub>, σ*<sub>t</sub>, e<sup>(λ/2)</sup>"),
        ("learned_range, x0_, vlb_term_bpd, x0_per_output", "learned_range, x0_, vlb_term_bpd, x0_per_output"),
        ('<span class="doc doc-object-name">q_sample</span>', '<span class="doc doc-object-name">q_sample</span>'),
        ('<a href="x_0.html"><code>x_t</code></a> γ_t', '<a href="x_0.html"><code>x_t</code></a> γ<sub>t</sub>'),
    ],
)
def test_formulas_of_text(text, html):
    assert formulas.in_html(text) == html


def test_a_block_is_a_formula_if_each_of_its_lines_is():
    block = '<div class="highlight"><pre><span></span><code>{}\n</code></pre></div>'
    assert formulas.in_html(block.format("Σ_t L_t\n½ x_0")) == (
        '<div class="formula">Σ<sub>t</sub> L<sub>t</sub>\n½ x<sub>0</sub></div>'
    )
    code = block.format("x_0 = ...\n# √x_0")
    assert formulas.in_html(code) == code
