"""Asymmetric numeral systems (Duda 2009): integers on a stack of bits, under rounded Gaussians or tables.

`push` writes integers under a distribution: each costs −log₂ of its probability in bits. `pop` reads them back, last in
first out. A pop of bits that no such push wrote draws from the distribution, and pushing the draw restores those bits.
This is the "bits back" of Townsend, Bird & Barber (2019).

The coder is that of `constriction`. Probabilities are multiples of 2⁻²⁴, and every integer of a window gets at least
2⁻²⁴. So a window of w integers takes w·2⁻²⁴ from the Gaussian, and an integer costs 1.44·w·2⁻²⁴ bits more. A window of
6 standard deviations of 8 steps to either side costs 8e-6 bits; T = 1000 latents cost 0.008 bits/dim in all. Pops gain
most of this back. A window wide enough for every possible integer would cost whole bits.
"""

import constriction
import numpy as np
from jaxtyping import ArrayLike, Float, Int, UInt8, UInt32

RESERVE_WORDS = 3  # the coder's state has two words; it must never reach the end of the stack
MAX_EXCESS_BITS = 23  # of an integer outside the window: constriction's alphabets have fewer than 2²⁴ symbols
MAX_INTEGER = 2 ** (MAX_EXCESS_BITS - 1) - 1

_gaussian = constriction.stream.model.QuantizedGaussian
_uniform = constriction.stream.model.Uniform
_categorical = constriction.stream.model.Categorical(perfect=False)


class Stack:
    """A stack of words of bits. It also records the fewest words that it has held.

    Args:
        words: the words on the stack, the top last; the last word is not 0.
    """

    def __init__(self, words: UInt32[np.ndarray, " n"]):
        self._coder = constriction.stream.stack.AnsCoder(np.ascontiguousarray(words, np.uint32))
        self._lowest = self.num_words

    @property
    def num_words(self) -> int:
        """The height of the stack, in words of 32 bits."""
        return int(self._coder.num_words())

    def take_lowest(self) -> int:
        """The fewest words on the stack, before or after any operation, since the last call."""
        lowest, self._lowest = self._lowest, self.num_words
        return lowest

    def words(self) -> UInt32[np.ndarray, " n"]:
        """The words on the stack, the top last."""
        return self._coder.get_compressed()

    def push_inside(
        self, integers: Int[np.ndarray, " n"], mean: Float[np.ndarray, " n"], std: float, window: int
    ) -> None:
        """The inverse of `pop_inside`.

        Raises:
            ArithmeticError: `pop_inside` cannot return one of the integers.
        """
        centre = _centre(mean)
        if np.abs(integers - centre).max(initial=0) > window:
            raise ArithmeticError("a latent lies outside the range of this code")
        self._push_gaussian(integers - centre, _gaussian(-window, window), mean - centre, np.full(len(mean), std))

    def pop_inside(self, mean: Float[np.ndarray, " n"], std: float, window: int) -> Int[np.ndarray, " n"]:
        """Draws integers under rounded N(mean, std²), each within `window` of its mean."""
        centre = _centre(mean)
        offset = self._pop(_gaussian(-window, window), mean - centre, np.full(len(mean), std))
        return offset.astype(np.int64) + centre

    def push(
        self, integers: Int[np.ndarray, " n"], mean: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"], window: int
    ) -> None:
        """Writes integers under rounded N(mean, std²), at any distance from the mean.

        An integer outside the window is written as the end of the window and the distance from there. It costs at most
        24 bits, plus 4.6 bits for the number of binary digits of the distance, plus those digits.

        Raises:
            ArithmeticError: an integer is beyond ±MAX_INTEGER.
        """
        if np.abs(integers).max(initial=0) > MAX_INTEGER:
            raise ArithmeticError(f"a latent is {np.abs(integers).max()} steps of the grid from 0, above {MAX_INTEGER}")
        centre = _centre(mean)
        offset = integers - centre
        symbol = np.clip(offset, -window - 1, window + 1)
        is_outside = np.abs(symbol) > window
        self._push_excess(np.abs(offset - symbol)[is_outside])
        self._push_gaussian(symbol, _gaussian(-window - 1, window + 1), mean - centre, std)

    def pop(
        self, mean: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"], window: int
    ) -> Int[np.ndarray, " n"]:
        """The inverse of `push`."""
        centre = _centre(mean)
        offset = self._pop(_gaussian(-window - 1, window + 1), mean - centre, std).astype(np.int64)
        is_outside = np.abs(offset) > window
        offset[is_outside] += np.sign(offset[is_outside]) * self._pop_excess(int(is_outside.sum()))
        return offset + centre

    def push_levels(
        self,
        levels: UInt8[np.ndarray, " n"],
        mean: Float[np.ndarray, " n"],
        std: Float[np.ndarray, " n"],
        num_levels: int,
    ) -> None:
        """Writes pixel values 0…L − 1 under the Gaussian's mass on their bins; the outermost bins are open.

        Ho et al. (2020), eq. 13. `mean` and `std` are those of the pixel value, not of x in [-1, 1].
        """
        self._push_gaussian(levels, _gaussian(0, num_levels - 1), mean, std)

    def pop_levels(
        self, mean: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"], num_levels: int
    ) -> UInt8[np.ndarray, " n"]:
        """The inverse of `push_levels`."""
        return self._pop(_gaussian(0, num_levels - 1), mean, std).astype(np.uint8)

    def push_categorical(self, symbols: UInt8[np.ndarray, " n"], probs: Float[np.ndarray, "n size"]) -> None:
        """Writes numbers 0…size − 1, each under the probabilities of its row, which are at least 2⁻²⁴."""
        self._coder.encode_reverse(symbols.astype(np.int32), _categorical, probs)

    def pop_categorical(self, probs: Float[np.ndarray, "n size"]) -> UInt8[np.ndarray, " n"]:
        """The inverse of `push_categorical`."""
        return self._pop(_categorical, probs).astype(np.uint8)

    def push_number(self, number: int, size: int) -> None:
        """Writes one of 0…size − 1, at a cost of log₂ size bits."""
        if size > 1:
            self._push_sized(np.array([number]), np.array([size]))

    def pop_number(self, size: int) -> int:
        """The inverse of `push_number`."""
        return int(self._pop_sized(np.array([size]))[0]) if size > 1 else 0

    def _push_excess(self, excess: Int[np.ndarray, " n"]) -> None:
        """Writes numbers ≥ 0: the number of binary digits of excess + 1, and the digits after the first."""
        digits = np.frexp(excess + 1)[1]
        first = 1 << (digits - 1)
        has_more = digits > 1
        self._push_sized((excess + 1 - first)[has_more], first[has_more])
        self._push_sized(digits - 1, np.full(len(digits), MAX_EXCESS_BITS + 1))

    def _pop_excess(self, count: int) -> Int[np.ndarray, " n"]:
        digits = self._pop_sized(np.full(count, MAX_EXCESS_BITS + 1)).astype(np.int64) + 1
        first = 1 << (digits - 1)
        has_more = digits > 1
        rest = np.zeros_like(first)
        rest[has_more] = self._pop_sized(first[has_more])
        return first + rest - 1

    def _push_sized(self, numbers: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> None:
        if len(numbers):
            self._coder.encode_reverse(numbers.astype(np.int32), _uniform(), sizes.astype(np.int32))

    def _pop_sized(self, sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._pop(_uniform(), sizes.astype(np.int32)) if len(sizes) else sizes

    def _push_gaussian(
        self,
        symbols: Int[np.ndarray, " n"] | UInt8[np.ndarray, " n"],
        model: constriction.stream.model.QuantizedGaussian,
        mean: Float[np.ndarray, " n"],
        std: Float[np.ndarray, " n"],
    ) -> None:
        self._coder.encode_reverse(symbols.astype(np.int32), model, mean, std)

    def _pop(self, model: constriction.stream.model.Model, *parameters: ArrayLike) -> np.ndarray:
        found = self._coder.decode(model, *parameters)
        self._lowest = min(self._lowest, self.num_words)
        if self._lowest < RESERVE_WORDS:  # at the end the coder would continue with bits that cannot be restored
            raise ArithmeticError("the stack of bits ran empty")
        return found


def _centre(mean: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The integer nearest to a mean, clipped to ±MAX_INTEGER. The clip only costs bits."""
    return np.clip(np.rint(mean), -MAX_INTEGER, MAX_INTEGER).astype(np.int64)
