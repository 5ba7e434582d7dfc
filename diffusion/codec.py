"""The bound as bits: lossless compression of images with the chain of latents, and back.

Bit-Swap (Kingma, Abbeel & Ho 2019, algorithm 1) on the latents of Ho et al. (2020). For t = 1…T,

    pop x_t ~ q(x_t | x_{t−1}),  push x_{t−1} under p_θ(x_{t−1} | x_t);  then push x_T under N(0, I)

What was pushed minus what was popped is log q(x_{1:T} | x_0) − log p_θ(x_{0:T}), whose mean is the bound of eq. 3.
Decoding runs the same steps backwards. Pushing as soon as possible keeps few bits on loan: those that x_t has given x_0
less what was paid for it, and not those of all latents at once. They come from the images before it, and at first
from random bits.

**The grid.** Code needs numbers out of a list, so x_t is k·δ_t with an integer k, and δ_t = 2^−precision times the
smaller of the standard deviations of q(x_t | x_{t−1}) and q(x_t | x_{t+1}, x_0). The pop of x_t gains log 1/δ_t that its
push pays. What is left of the grid is the rounding: noise of variance δ²/12, which makes the variances of q larger by
at most r = 4^−precision/12 of theirs. A Gaussian coded with a variance that is wrong by r costs r²/4 nats: 4e-7 at precision
3, or at T = 1000 6e-4 bits/dim. For what the coder itself costs, see `ans`.

**Floats.** Both directions call one compiled program on batches of one shape and take its means and standard
deviations as they are; a last bit that differed would garble all that follows. `Codec.fingerprint` tells machines
apart on which they do.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from diffusion.ans import RESERVE_WORDS, Stack
from diffusion.model import Model

PRECISION = 3  # of the grid: 2³ steps to the smaller standard deviation
WINDOW_STDS = 6  # beyond it a Gaussian has less than the 2⁻²⁴ that the coder keeps for every integer
FIRST_GROUP = 2  # images whose latents are drawn from random bits
CAUTION = 0.95  # of the bits that are there, how many the next images may need
WORD_BITS = 32


class Message(NamedTuple):
    """Images as words of bits, the first of which to be read is the last.

    initial_words: how many of the words hold random bits with which the coding began.
    """

    words: UInt32[np.ndarray, " n"]
    initial_words: int


class Codec:
    """The two directions, for one model and one shape of images.

    Args:
        model: takes no labels; the images have its number of levels.
        image_shape: (H, W, C).
        batch_size: images that the network sees at once. What was encoded with one is decoded with the same.
        precision: of the grid.
    """

    def __init__(
        self, model: Model, image_shape: tuple[int, int, int], batch_size: int, precision: int = PRECISION
    ):
        if model.takes_labels:
            raise ValueError("a network that takes labels cannot code without them; close over them with `guidance`")
        self._grid = Grid.of(model, precision)
        self._levels, self._shape, self._batch_size = model.num_levels, image_shape, batch_size
        self._reverse = functools.partial(jax.jit(_reverse), jax.device_put(model))

    def encode(
        self, images: UInt8[np.ndarray, "n h w c"], seed: int = 0, tick: Callable[[int], None] | None = None
    ) -> Message:
        """The images as bits.

        Args:
            images: pixel values.
            seed: of the random bits.
            tick: called with the number of images after each group.

        Raises:
            ArithmeticError: the network's output is NaN or Inf.
        """
        supply = self._supply()
        # The last word may not be 0. All are drawn top first, so that fewer would be the same.
        drawn = np.random.default_rng(seed).integers(1, 2**WORD_BITS, supply, np.uint32)
        stack, begin, size, loans = Stack(drawn[::-1]), 0, FIRST_GROUP, []
        while begin < len(images):
            size = min(size, len(images) - begin, self._batch_size)
            before, stack.lowest_words, lowest = stack.num_words, stack.num_words, stack.lowest_words
            self._push_images(stack, images[begin : begin + size])
            stack.push_number(size - 1, self._batch_size)
            begin += size
            if tick is not None:
                tick(size)
            loans.append((before - stack.lowest_words) / size)
            stack.lowest_words = min(lowest, stack.lowest_words)
            size = max(1, int(CAUTION * (stack.num_words - stack.lowest_words) / max(loans)))
        unused = stack.lowest_words - RESERVE_WORDS - 1
        return Message(stack.words()[unused:], supply - unused)

    def decode(
        self, message: Message, num_images: int, tick: Callable[[int], None] | None = None
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The images that `encode` was given.

        Raises:
            ArithmeticError: the bits are not those of so many images under this model, as far as that can be seen.
        """
        stack, groups, missing = Stack(message.words), [], num_images
        while missing > 0:
            size = stack.pop_number(self._batch_size) + 1
            groups.append(self._pop_images(stack, size))
            missing -= size
            if tick is not None:
                tick(size)
        if missing or stack.num_words != message.initial_words:
            raise ArithmeticError(f"the bits are not those of {num_images} images")
        return np.concatenate([np.zeros((0, *self._shape), np.uint8), *reversed(groups)])

    def fingerprint(self) -> bytes:
        """A digest of what the network computes of fixed inputs, bit by bit, and of the grid."""
        probe = np.random.default_rng(0).standard_normal((self._batch_size, *self._shape), np.float32)
        digest = hashlib.sha256(self._grid.spacing.tobytes())
        for t in sorted({1, (self._grid.num_steps + 1) // 2, self._grid.num_steps}):
            for part in self._reverse(probe, np.int32(t)):
                digest.update(np.asarray(part))
        return digest.digest()

    def _supply(self) -> int:
        """Words of random bits that will do for the first images; what is left of them is not part of the message.

        Before x_{t−1} is paid for, the entropy of x_t given x_0 is on loan, or less.
        """
        bits_per_dim = np.log2(math.sqrt(2 * math.pi * math.e) * self._grid.marginal_std[1:] / self._grid.spacing[1:])
        dims = FIRST_GROUP * math.prod(self._shape)
        return int(2 * dims * bits_per_dim.max() / WORD_BITS) + 100

    def _push_images(self, stack: Stack, images: UInt8[np.ndarray, "n h w c"]) -> None:
        grid, x_prev, k_prev = self._grid, _to_unit(images, self._levels), None
        for t in range(1, grid.num_steps + 1):
            k = stack.pop_inside(*grid.forward(t, x_prev), grid.window(t))
            x_t = k * grid.spacing[t]
            mean, std = self._posterior(x_t, t)
            if t == 1:
                stack.push_levels(images.ravel(), *self._in_levels(mean, std), self._levels)
            else:
                stack.push(k_prev, mean / grid.spacing[t - 1], std / grid.spacing[t - 1], grid.window(t - 1, t))
            x_prev, k_prev = x_t, k
        stack.push(k_prev, *grid.prior(len(k_prev)), grid.prior_window)

    def _pop_images(self, stack: Stack, num_images: int) -> UInt8[np.ndarray, "n h w c"]:
        grid = self._grid
        k = stack.pop(*grid.prior(num_images * math.prod(self._shape)), grid.prior_window)
        for t in range(grid.num_steps, 0, -1):
            mean, std = self._posterior(k * grid.spacing[t], t)
            if t == 1:
                k_prev = stack.pop_levels(*self._in_levels(mean, std), self._levels)
                x_prev = _to_unit(k_prev, self._levels)
            else:
                k_prev = stack.pop(mean / grid.spacing[t - 1], std / grid.spacing[t - 1], grid.window(t - 1, t))
                x_prev = k_prev * grid.spacing[t - 1]
            stack.push_inside(k, *grid.forward(t, x_prev), grid.window(t))
            k = k_prev
        return k.reshape(num_images, *self._shape)
