"""Formulas of the pages, which are Unicode text: x_{t−1}, γ_t and 2^−n get real subscripts and superscripts in HTML."""

import re

# SNR, dx or one letter, with a digit or an accent (x0, β̃, σ*), is a symbol; a longer name, as in learned_range, is not.
SYMBOL = r"(?<![^\W\d])(?<![^\W\d]\d)(SNR|d?[^\W\d_]\d?[\u0300-\u036f*]?|[Σ∫∏√)\]])"
BRACES = r"\{((?:[^{}]|\{[^{}]*\})+)\}"
SUBSCRIPT = re.compile(rf"{SYMBOL}_(?![A-Z]{{2}})(?:{BRACES}|(∞|[^\W_²³]+(?![^\W²³])))")
SUPERSCRIPT = re.compile(rf"\^(?:{BRACES}|([−-]?(?:[^\W²³]+|\([^()]*\))))")
# Tags, code, and what the docstrings' pages name.
VERBATIM = re.compile(
    r"(<(pre|code|script|style)\b.*?</\2>|<span class=\"doc doc-object-name[^>]*>[^<]*</span>|<[^>]+>)", re.DOTALL
)
# A block of text is a formula if each of its lines has one of these signs.
BLOCK = re.compile(r'<div class="(?:language-text )?highlight"><pre>(.*?)</pre></div>', re.DOTALL)
SIGNS = re.compile(r"[Σ∫‖½√∝≤≥\u0300-\u036f]|KL\(")


def in_text(text: str) -> str:
    """Returns `text` with <sub> and <sup>."""
    text = SUBSCRIPT.sub(lambda found: f"{found[1]}<sub>{in_text(found[2] or found[3])}</sub>", text)
    return SUPERSCRIPT.sub(lambda found: f"<sup>{found[1] or found[2]}</sup>", text)


def in_html(html: str) -> str:
    """Returns `html` with the formulas of its text set; code stays as it is, apart from blocks that are formulas."""
    html = BLOCK.sub(_block, html)
    parts = VERBATIM.split(html)
    # Two groups: every third part is text, followed by what is kept and the name of its tag.
    pieces = [in_text(text) + kept for text, kept in zip(parts[::3], [*parts[1::3], ""], strict=True)]
    return "".join(pieces)


def _block(found: re.Match) -> str:
    text = re.sub(r"<[^>]+>", "", found[1]).strip()
    return f'<div class="formula">{text}</div>' if all(map(SIGNS.search, text.split("\n"))) else found[0]
