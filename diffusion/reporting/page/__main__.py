"""Makes report.html of a run or of a sweep again: python -m diffusion.reporting.page DIR"""

import argparse
import sys
from pathlib import Path

from diffusion.reporting import page
from diffusion.runtime import streams


def main(argv: list[str] | None = None) -> int:
    """Runs the command. A directory without a run or a sweep prints a one-line error, with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m diffusion.reporting.page", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the working directory of a run or of a sweep")
    try:
        print(page.write(parser.parse_args(argv).directory))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    streams.guard()
    sys.exit(main())
