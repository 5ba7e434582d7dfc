"""report.html: a run or a sweep as one page, made of the files that lie there, which needs no network.

Its text, tables, curves (SVG) and pictures (PNG) are in the one file; so are a style sheet and a short script, without
which it can be read, too. The same files make the same page, byte for byte.
"""

from diffusion.reporting.page.document import NAME, refresh, write

__all__ = ["NAME", "refresh", "write"]
