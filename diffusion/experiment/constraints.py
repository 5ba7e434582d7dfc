"""Constraints on the value of a config key: a type and a range. A key that chooses by name has a `names.Choice`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusion.experiment import names
from diffusion.post_hoc_ema import LONGEST, SHORTEST


class Constraint(NamedTuple):
    """A test for a value, and a description of the allowed values."""

    accepts: Callable[[Any], bool]
    words: str

    def problem(self, value: Any) -> str | None:
        """The problem with a value, to follow "config key KEY" in a message; None if there is no problem."""
        return None if self.accepts(value) else f"must be {self.words}, not {value!r}"


def integer(at_least: int, at_most: int = 2**31 - 1) -> Constraint:
    end = "2³¹ − 1" if at_most == 2**31 - 1 else f"{at_most:,}"
    return Constraint(lambda v: names.accepts(int, v) and at_least <= v <= at_most, f"an integer in {at_least}…{end}")


def number(low: float | int, high: float | int, words: str) -> Constraint:
    return Constraint(lambda v: names.accepts(float, v) and low <= v <= high, words)


def of_type(annotation: Any) -> Constraint:
    return Constraint(lambda v: names.accepts(annotation, v), names.words(annotation))


TEXT, FLAG = of_type(str), of_type(bool)
EMA_LENGTH = Constraint(
    lambda v: names.accepts(float, v) and (v == 0 or SHORTEST <= v <= LONGEST),
    f"0 or a number in [{SHORTEST}, {LONGEST}]",
)
EMA_LENGTHS = Constraint(
    lambda v: names.accepts(tuple[float, ...], v)
    and (v == () or len(v) == 2 and SHORTEST <= v[0] < v[1] <= LONGEST),
    f"(short, long) in [{SHORTEST}, {LONGEST}], such as (0.05, 0.1), or () for none",
)
