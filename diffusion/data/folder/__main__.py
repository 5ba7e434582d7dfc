"""Prepares a folder of pictures as a data set: python -m diffusion.data.folder DIR --name=NAME --size=64

Every picture is decoded, cropped and resized once. The result is a TFDS directory in ArrayRecord format, on which
--config.data.name=NAME trains; docs/own_data.md is the manual. The same command continues an interrupted one.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

from diffusion.data.folder import decoding, preparing
from diffusion.data.folder.decoding import Target
from diffusion.data.folder.listing import Unread
from diffusion.runtime import streams


def main(argv: list[str] | None = None) -> int:
    """Runs the command. An error is the last line on stderr.

    Returns:
        0; 1 if files cannot be read, 2 for any other error, 75 (EX_TEMPFAIL) if it was asked to stop.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
        return 0
    except KeyboardInterrupt:
        _print_error("stopped; the same command goes on")
        return os.EX_TEMPFAIL
    except preparing.UnreadFiles as error:
        _print_unread(error.unread)
        _print_error(f"error: {error}")
        return 1
    except MemoryError:
        _print_error("error: out of memory; give the same command again with fewer --workers")
    except (ValueError, OSError) as error:
        _print_error(f"error: {error}")
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of pictures")
    parser.add_argument("--name", required=True, help="the name of the data set, for --config.data.name=NAME")
    parser.add_argument("--size", required=True, metavar="N|HxW", help="the size of every picture: 64, or HEIGHTxWIDTH")
    parser.add_argument("--data-dir", metavar="DIR", help="the directory of data sets; default: that of TFDS")
    parser.add_argument("--resize", choices=decoding.RESIZE, default="box", help="default: box, the mean of an area")
    parser.add_argument("--crop", choices=decoding.CROP, default="center", help="default: center; none stretches")
    parser.add_argument("--channels", type=int, choices=decoding.MODES, default=3, help="3, or 1 for grey")
    parser.add_argument("--background", default="white", metavar="COLOUR", help="the colour behind transparent pixels")
    parser.add_argument("--labels", metavar="folders|none|FILE", help="default: folders, if every picture is in one")
    parser.add_argument("--test-fraction", type=float, metavar="F", help=f"default: {preparing.TEST_FRACTION}")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    size = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", arguments.size)
    if size is None:
        raise ValueError(f"--size={arguments.size} must look like 64 or, as HEIGHTxWIDTH, like 64x96")
    if arguments.workers < 1:
        raise ValueError(f"--workers={arguments.workers} must be at least 1")
    target = Target(
        height=int(size[1]),
        width=int(size[2] or size[1]),
        channels=arguments.channels,
        resize=arguments.resize,
        crop=arguments.crop,
        background=decoding.parse_colour(arguments.background),
    )
    directory = preparing.place(arguments.name, arguments.data_dir)
    plan = preparing.plan(arguments.folder, directory, target, arguments.labels, arguments.test_fraction)
    _print_unread(preparing.prepare(plan, directory, arguments.skip_bad, arguments.workers))


def _print_unread(unread: list[Unread]) -> None:
    for file in unread:
        _print_error(f"cannot be read: {file.path}: {file.reason}")


def _print_error(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


if __name__ == "__main__":
    streams.guard()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
