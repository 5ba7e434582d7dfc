"""Is it a bound? Sums 2^−bits over every image of spaces small enough to enumerate: docs/audit.md.

    python -m experiments.audit [--workdir=experiments/results/audit]

A bound on discrete data is the length of a code, so Σ 2^−bound ≤ 1, and its mean under the data is at least their
entropy. The audit checks every variance, decoder, schedule and protocol, in discrete and continuous time, for exact,
random and trained networks. It also checks importance weights, the ODE's density (needs the extra `ode`) and the
codec's files. Constructions that look like bounds but are not must fail. The exit code is 1 if any check has the wrong
result. Writes table.md and table.csv into the working directory, if one is given.
"""

import datetime
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Array

from diffusion import reverse, schedules
from diffusion.reporting import summary
from diffusion.runtime import files
from experiments import audit_bounds, audit_controls, audit_samples, audit_spaces, commands, tables
from experiments.audit_bounds import Row
from experiments.audit_quadrature import Variant, bound_bits
from experiments.audit_spaces import SPACES, Moments, Space

__all__ = ["Space", "bound_bits", "excess", "rows"]

NUM_STEPS = 8
NUM_TRAJECTORIES = 4096
COPIES = 256


def excess(bound_of: Callable[[Array], Array], space: Space) -> float:
    """Σ 2^−bits over all images, minus 1. If it is above 0 by more than the bits' error, they are not code lengths.

    Args:
        bound_of: (images [n, 1, 1, d] in [-1, 1]) -> the bits [n] of each image, for all d numbers together and in
            expectation over any noise. (With noisy estimates, the sum is too large on average: Jensen.)
        space: the space of images.
    """
    bits = np.asarray(bound_of(space.images), np.float64)
    if bits.shape != (len(space.images),):
        raise ValueError(f"bound_of returned an array {bits.shape}, not the bits of {len(space.images)} images")
    return float(np.exp2(-bits).sum() - 1)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = commands.argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, help="where table.md and table.csv go")
    arguments = parser.parse_args()
    start = time.monotonic()
    found = list(rows())
    text = report(found, time.monotonic() - start)
    print(text)
    if arguments.workdir is not None:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(arguments.workdir / "table.md", text)
        tables.save_csv(arguments.workdir / "table.csv", [row.as_printed() for row in found])
    return 0 if all(row.is_as_expected for row in found) else 1


def rows() -> Iterator[Row]:
    """Yields every row of the audit."""

    def of_part(space: Space, part: Callable[[Space, dict[str, Moments]], Iterator[Row]]) -> list[Row]:
        return list(part(space, networks[space].result()))

    # Compilation takes most of the time, and two can run at once. Long parts start first, so that both end together.
    with ThreadPoolExecutor(2) as pool:
        networks = {space: pool.submit(networks_of, space) for space in reversed(SPACES)}
        elsewhere = pool.submit(list, on_some_space())
        order = [(space, part) for part in PARTS for space in reversed(SPACES)]
        found = {key: pool.submit(of_part, *key) for key in order}
        for space in SPACES:
            for part in PARTS:
                yield from found[space, part].result()
        yield from elsewhere.result()


# For the space that takes longest. The other two use every schedule.
SOME_SCHEDULES = {3: ("cosine", "learned")}
SOME_CURVES = {3: ("cosine",)}


def discrete(space: Space, networks: dict[str, Moments]) -> Iterator[Row]:
    """Every variant at T = 8."""
    some, variants = SOME_SCHEDULES.get(space.num_pixels, ()), audit_bounds.variants()
    if space.num_pixels == 3:  # the other two spaces check the protocols' other ways to compute a bin's mass
        variants = {name: variant for name, variant in variants.items() if name.endswith("exact")}
    yield from audit_bounds.discrete(space, networks, NUM_STEPS, variants, some)


def continuous(space: Space, networks: dict[str, Moments]) -> Iterator[Row]:
    """The bound for T → ∞."""
    yield from audit_bounds.continuous(space, networks, SOME_CURVES.get(space.num_pixels, ()))


def controls(space: Space, networks: dict[str, Moments]) -> Iterator[Row]:
    """The controls, which must fail, beside bounds that differ from them in one point."""
    yield from audit_controls.rows(space)


def on_some_space() -> Iterator[Row]:
    """Rows for a single space: labels, one and two steps, a nearly tight bound, and a clamp on 256 levels."""
    yield from audit_bounds.labels(Space(2, 8))
    exact = {"exact": SPACES[1].exact()}
    tight = {"x0, learned, bayes": Variant(reverse.make("x0", "learned", "bayes"))}
    yield from audit_bounds.discrete(SPACES[1], exact, 400, tight, only=("cosine",))
    of_eps = audit_bounds.variants(("eps",))
    for num_steps in (1, 2):
        yield from audit_bounds.discrete(SPACES[1], exact, num_steps, of_eps, only=("cosine",))
    yield from audit_controls.photographs()


def networks_of(space: Space) -> dict[str, Moments]:
    """An exact, a random and a trained network."""
    random = audit_spaces.random_network(space.num_pixels)
    return audit_spaces.alike(space.exact(), {"random": random, "trained": audit_spaces.trained_network(space)})


def sampled(space: Space, networks: dict[str, Moments]) -> Iterator[Row]:
    """The bounds that need samples or a solver."""
    schedule = schedules.cosine(NUM_STEPS)
    for network, decoder in (("exact", "network"), ("trained", "bayes")):
        p = reverse.make("x0", "learned", decoder)
        yield from audit_samples.importance(space, network, networks[network], p, schedule, NUM_TRAJECTORIES)
    for network in ("exact", "trained"):
        yield from audit_samples.dequantized(space, network, networks[network])
    yield audit_samples.codec(space, "exact", networks["exact"], "network", COPIES)
    if space.num_pixels == 1:
        yield audit_samples.codec(space, "trained", networks["trained"], "network", COPIES)
        yield audit_samples.codec(space, "exact", networks["exact"], "bayes", COPIES)


PARTS = (discrete, continuous, sampled, controls)


def report(found: list[Row], seconds: float) -> str:
    """A line per construction: in each space, the largest Σ 2^−bits − 1 over networks and settings, ± its error."""
    spaces = sorted({row.space for row in found}, key=lambda name: (name not in map(str, SPACES), name))
    lines = []
    for (kind, what), members in itertools.groupby(sorted(found, key=_group), key=_group):
        chosen = list(members)
        above = [row.mean_bits - row.entropy_bits for row in chosen if row.mean_bits is not None]
        sums = [_greatest([row for row in chosen if row.space == space]) for space in spaces]
        least = _signed(min(above)) if above else "–"
        lines.append((kind, what, str(len(chosen)), *sums, least, _verdict(chosen)))
    head = ("", "construction", "checked", *spaces, "least mean − H", "a code?")
    wrong = sum(not row.is_as_expected for row in found)
    controls = sum(row.kind == "control" for row in found)
    counts = f"{len(found) - controls} bounds and {controls} controls, {wrong} of them with an unexpected result"
    where = f"{summary.device_name()}, {datetime.date.today()}, {seconds:.0f} s"
    return f"`python -m experiments.audit`: {counts}. {where}.\n\n{tables.markdown(head, lines)}"


def _group(row: Row) -> tuple[str, str]:
    return row.kind, row.what


def _greatest(chosen: list[Row]) -> str:
    """The sum closest to failing, minus 1, ± its error."""
    if not chosen:
        return "–"
    worst = max(chosen, key=lambda row: (not row.is_as_expected, row.total - row.error))
    return f"{_signed(worst.total - 1)} ± {worst.error:.0e}"


def _signed(number: float) -> str:
    return f"{number:+.4f}" if abs(number) >= 1e-4 else f"{number:+.1e}"


def _verdict(chosen: list[Row]) -> str:
    word = "no" if not all(row.is_code for row in chosen) else "yes"
    return word if all(row.is_as_expected for row in chosen) else f"**{word}**"


if __name__ == "__main__":
    commands.exit_with(main)
