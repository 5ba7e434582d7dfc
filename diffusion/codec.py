"""The bound as bits: lossless coding and decoding of images with the chain of latents.

Bit-Swap (Kingma, Abbeel & Ho 2019, algorithm 1) on the latents of Ho et al. (2020). For t = 1…T,

    pop x_t ~ q(x_t | x_{t−1}),  push x_{t−1} under p_θ(x_{t−1} | x_t);  then push x_T under N(0, I)

The pushed bits minus the popped bits are log q(x_{1:T} | x_0) − log p_θ(x_{0:T}). Its mean is the bound of eq. 3.
Decoding runs the same steps backwards. Each push comes as soon as possible, so few bits are borrowed at a time: the
bits of x_t given x_0 minus those already paid, not the bits of all latents at once. They are borrowed from the previous
images, and at first from random bits.

**The grid.** A code needs discrete values, so x_t is k·δ_t with an integer k. δ_t is 2^−precision times the smaller of
the standard deviations of q(x_t | x_{t−1}) and q(x_t | x_{t+1}, x_0). The pop of x_t gains the log 1/δ_t that its push
pays. Only the rounding remains. It is noise of variance δ²/12, which enlarges the variances of q by a fraction r of at
most 4^−precision/12. A Gaussian coded with a variance that is wrong by r costs r²/4 nats: 4e-7 at precision 3, or 6e-4
bits/dim at T = 1000. `ans` states the cost of the coder itself.

**Floats.** Both directions call one compiled program on batches of one shape, and use its means and standard deviations
as they are. A difference in the last bit would garble everything after it. `Codec.fingerprint` detects machines whose
last bits differ.
"""

import dataclasses
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
from diffusion.codec_groups import Groups
from diffusion.gaussian import Gaussian
from diffusion.model import Model
from diffusion.schedules import Schedule

WINDOW_STDS = 6  # beyond it a Gaussian has less than the 2⁻²⁴ that the coder keeps for every integer
WORD_BITS = 32
STD_STEPS = (1e-6, 1e6)  # a learned standard deviation is kept between these, in steps of what is coded


class Message(NamedTuple):
    """Images as words of bits. Decoding reads the last word first.

    initial_words: how many of the words hold the random bits with which the coding began.
    """

    words: UInt32[np.ndarray, " n"]
    initial_words: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that latents can take, and q on them, in float64. Every table has T + 1 entries.

    Means, standard deviations and windows are in steps of the grid.
    """

    spacing: Float[np.ndarray, " t"]  # δ_t; entry 0 is not used, as x_0 is a pixel value
    sqrt_alpha: Float[np.ndarray, " t"]
    sqrt_beta: Float[np.ndarray, " t"]
    marginal_std: Float[np.ndarray, " t"]  # of q(x_t | x_0)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.spacing) - 1

    def forward(self, t: int, x_prev: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " n"], float, int]:
        """Mean, standard deviation and window of q(x_t | x_{t−1}): Ho et al. (2020), eq. 2."""
        std = float(self.sqrt_beta[t] / self.spacing[t])
        return self.sqrt_alpha[t] * x_prev / self.spacing[t], std, _window(std)

    def reverse_window(self, t: int) -> int:
        """The window of p_θ(x_{t−1} | x_t), whose standard deviation is seldom above √β_t."""
        return _window(float(self.sqrt_beta[t] / self.spacing[t - 1]))

    def prior(self, n: int) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], int]:
        """Mean, standard deviation and window of x_T ~ N(0, I)."""
        std = float(1 / self.spacing[-1])
        return np.zeros(n), np.full(n, std), _window(std)


def grid(schedule: Schedule, precision: int) -> Grid:
    """The grid whose δ_t is 2^−precision of the smaller standard deviation of q(x_t | x_{t−1}), q(x_t | x_{t+1}, x_0).

    At t = T only the first of the two exists.
    """
    log_beta, log_beta_tilde, log_alpha, log_marginal_var = (
        np.asarray(table, np.float64)
        for table in (schedule.log_beta, schedule.log_beta_tilde, schedule.log_alpha, schedule.log_one_minus_alpha_bar)
    )
    smaller = np.minimum(log_beta, np.append(log_beta_tilde[1:], np.inf))
    return Grid(
        2.0**-precision * np.exp(0.5 * smaller),
        np.exp(0.5 * log_alpha),
        np.exp(0.5 * log_beta),
        np.exp(0.5 * log_marginal_var),
    )


class Codec:
    """The two directions, for one model and one shape of images.

    Args:
        model: a model without labels, for images with its number of levels.
        image_shape: (H, W, C).
        batch_size: images that the network sees at once. Decoding needs the batch size of encoding.
        precision: the precision of the grid.

    Raises:
        ValueError: the model takes labels.
    """

    def __init__(self, model: Model, image_shape: tuple[int, int, int], batch_size: int, precision: int):
        if model.takes_labels:
            raise ValueError("a network that takes labels has no density of images; bind its labels with `guidance`")
        self._grid, self._num_levels = grid(jax.device_get(model.schedule), precision), model.num_levels
        self._shape, self._batch_size = image_shape, batch_size
        self._reverse = functools.partial(jax.jit(_reverse), jax.device_put(model))
        # The coder computes a Gaussian's masses on bins without a table.
        table = functools.partial(model.p.level_probs, num_levels=model.num_levels)
        self._table = None if model.p.decoder == "network" else jax.jit(table)

    def encode(
        self, images: UInt8[np.ndarray, "n h w c"], seed: int = 0, tick: Callable[[int], None] = lambda done: None
    ) -> Message:
        """Encodes the images as bits.

        Args:
            images: pixel values.
            seed: the seed of the random bits.
            tick: called with the number of images after each group; it may raise.

        Raises:
            ArithmeticError: the network's output is NaN or Inf.
        """
        supply = self._supply()
        # Never 0, because the last word must not be 0.
        stack = Stack(np.random.default_rng(seed).integers(1, 2**WORD_BITS, supply, np.uint32))
        groups, begin = Groups(self._batch_size, supply), 0
        while begin < len(images):
            group, before = images[begin : begin + groups.size], stack.num_words
            self._push_images(stack, group)
            groups.grow(len(group), before, stack.take_lowest(), stack.num_words)
            begin += len(group)
            tick(len(group))
        groups.push(stack)
        unused = groups.lowest - RESERVE_WORDS
        return Message(stack.words()[unused:], supply - unused)

    def decode(
        self, message: Message, num_images: int, tick: Callable[[int], None] = lambda done: None
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Decodes the images that `encode` was given.

        Raises:
            ArithmeticError: these are not the bits of so many images under this model. Not every such case is detected.
        """
        stack = Stack(message.words)
        decoded = [np.zeros((0, *self._shape), np.uint8)]
        for size in reversed(Groups(self._batch_size).pop(stack, num_images)):
            decoded.append(self._pop_images(stack, size))
            tick(size)
        if stack.num_words != message.initial_words:
            raise ArithmeticError(f"these are not the bits of {num_images} images")
        return np.concatenate(decoded[::-1])

    def fingerprint(self) -> bytes:
        """A digest of the grid and, bit by bit, of the network's output for a fixed input."""
        probe = np.random.default_rng(0).standard_normal((self._batch_size, *self._shape), np.float32)
        digest = hashlib.sha256()
        for table in (self._grid.spacing, self._grid.sqrt_alpha, self._grid.sqrt_beta):
            digest.update(table)
        for t in sorted({1, (self._grid.num_steps + 1) // 2, self._grid.num_steps}):
            for part in self._reverse(probe, np.int32(t)):
                digest.update(np.asarray(part))
        return digest.digest()

    def _supply(self) -> int:
        """The number of words of random bits that suffice for any group. The message holds only the used ones.

        When x_t is popped, x_{t−1} is not pushed yet. So the entropies of x_{t−1} given x_0 and of x_t given x_{t−1}
        are counted as borrowed, although a part of them is already paid.
        """
        spacing = self._grid.spacing[1:]
        of_step = _entropy_bits(self._grid.sqrt_beta[1:] / spacing)
        before = np.append(0.0, _entropy_bits(self._grid.marginal_std[1:] / spacing)[:-1])
        bits_per_dim = (before + of_step).max()
        return 1000 + math.ceil(1.1 * self._batch_size * math.prod(self._shape) * bits_per_dim / WORD_BITS)

    def _push_images(self, stack: Stack, images: UInt8[np.ndarray, "n h w c"]) -> None:
        k_prev = images.ravel()
        for t in range(1, self._grid.num_steps + 1):
            k = stack.pop_inside(*self._grid.forward(t, self._latent(k_prev, t - 1)))
            mean, std = self._p(k, t)
            if t > 1:
                stack.push(k_prev, mean, std, self._grid.reverse_window(t))
            elif self._table is None:
                stack.push_levels(k_prev, mean, std, self._num_levels)
            else:
                for i in reversed(range(len(images))):
                    stack.push_categorical(images[i].ravel(), self._probs(i, mean, std))
            k_prev = k
        stack.push(k_prev, *self._grid.prior(images.size))

    def _pop_images(self, stack: Stack, num_images: int) -> UInt8[np.ndarray, "n h w c"]:
        k = stack.pop(*self._grid.prior(num_images * math.prod(self._shape)))
        for t in range(self._grid.num_steps, 0, -1):
            mean, std = self._p(k, t)
            if t > 1:
                k_prev = stack.pop(mean, std, self._grid.reverse_window(t))
            elif self._table is None:
                k_prev = stack.pop_levels(mean, std, self._num_levels)
            else:
                levels = [stack.pop_categorical(self._probs(i, mean, std)) for i in range(num_images)]
                k_prev = np.concatenate(levels)
            stack.push_inside(k, *self._grid.forward(t, self._latent(k_prev, t - 1)))
            k = k_prev
        return k.reshape(num_images, *self._shape)

    def _probs(
        self, i: int, mean: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, "dims num_levels"]:
        """p(x_0 | x_1) of image i alone: the table is L times as large as the image."""
        half_range = (self._num_levels - 1) / 2
        mean, std = (part.reshape(-1, math.prod(self._shape))[i] / half_range for part in (mean, std))
        return np.asarray(self._table(Gaussian(np.float32(mean - 1), np.float32(2 * np.log(std)))))

    def _latent(self, k: Int[np.ndarray, " n"] | UInt8[np.ndarray, " n"], t: int) -> Float[np.ndarray, " n"]:
        """x_t of the images being coded: steps of the grid, or pixel values at t = 0."""
        return k / ((self._num_levels - 1) / 2) - 1.0 if t == 0 else k * self._grid.spacing[t]

    def _p(self, k: Int[np.ndarray, " n"], t: int) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Mean and standard deviation of p_θ(x_{t−1} | x_t) in steps of the grid, or at t = 1 in pixel values."""
        x_t = self._latent(k, t).astype(np.float32).reshape(-1, *self._shape)
        padded = np.zeros((self._batch_size, *self._shape), np.float32)
        padded[: len(x_t)] = x_t
        mean, std = (
            np.asarray(part)[: len(x_t)].astype(np.float64).ravel() for part in self._reverse(padded, np.int32(t))
        )
        if not np.isfinite(mean).all() or np.isnan(std).any():
            raise ArithmeticError(f"the network's output at t = {t} is NaN or Inf")
        half_range = (self._num_levels - 1) / 2
        if t == 1:
            mean, std = (mean + 1) * half_range, std * half_range
        else:
            mean, std = mean / self._grid.spacing[t - 1], std / self._grid.spacing[t - 1]
        return mean, np.clip(std, *STD_STEPS)


def _reverse(model: Model, x_t: Float[Array, "b h w c"], t: Int[Array, ""]) -> tuple[Array, Array]:
    """Mean and standard deviation of p_θ(x_{t−1} | x_t), with the clip and the matrix products of the evaluation."""
    with jax.default_matmul_precision("highest"):
        row = model.schedule[t]
        output = model.denoise(x_t, jnp.full(len(x_t), row.network_t))
        p, _ = jax.vmap(model.p, in_axes=(None, 0, 0))(row, x_t, output)
    return p.mean, jnp.exp(0.5 * p.log_var)


def _entropy_bits(std: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """The entropy of a Gaussian rounded to integers, in bits, by the formula of the density."""
    return np.log2(math.sqrt(2 * math.pi * math.e) * std)


def _window(std: float) -> int:
    return math.ceil(WINDOW_STDS * std)
