"""Arms for separate processes. They import this file by its name, because another package may be called `tests`."""

import argparse
import os

from benchmarks.timing import Arm, Arms


def our_arms(args: argparse.Namespace) -> Arms:
    return {f"ours {args.name}": Arm(lambda: b"x" * 2**26, {"process": os.getpid()})}


def peer_arms(args: argparse.Namespace) -> Arms:
    return {name: Arm(lambda: b"x" * 2**26, {"process": os.getpid()}) for name in ("theirs", "theirs, too")}


def refused_arms(args: argparse.Namespace) -> Arms:
    raise ValueError("cannot keep 2000 of 1000 steps")


def broken_arms(args: argparse.Namespace) -> Arms:
    raise KeyError("of the program")
