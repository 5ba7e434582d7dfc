"""The exact reverse process of a finite data set: the best that a network could learn from its images.

For N images q(x_t) is a mixture of N Gaussians, and so is

    q(x_{t−1} | x_t) = Σ_i w_i N(μ̃_t(x_t, x0_i), β̃_t I),   w_i ∝ exp(−‖x_t − √ᾱ_t x0_i‖² / 2(1 − ᾱ_t)),

The mean E[x_0 | x_t] = Σ_i w_i x0_i minimises every training loss that is a squared error. One evaluation is a pass
over all images, block by block. Besides the images it needs memory for one block and one batch.

Near t = 0 the exponents reach 10⁷, and float32 would lose their differences. So the differences are computed in
integers: see `_Query`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diffusion.reverse import Reverse
from diffusion.schedules import Schedule

FRACTION = 8  # an x_t is split into pixel values, eighths of a pixel value, and the rest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A data set in blocks of equal size; the last block is padded."""

    levels: Any  # uint8 [blocks, block, H, W, C]: arrays of JAX or of NumPy, or their shapes
    is_real: Any  # bool [blocks, block]; False for padding
    num_levels: int = dataclasses.field(metadata={"static": True})


def in_blocks(images: UInt8[np.ndarray, "n h w c"], num_levels: int, block_size: int) -> Blocks:
    """Cuts a data set into blocks, leaves [blocks, block, ...].

    Raises:
        ValueError: no images, a block size below 1, or images so large that their distances overflow int32.
    """
    if not len(images) or block_size < 1:
        raise ValueError(f"{len(images)} images cannot be cut into blocks of {block_size}")
    size = images[0].size
    if (FRACTION + 2) * size * num_levels**2 >= 2**31:
        shape = "×".join(map(str, images.shape[1:]))
        raise ValueError(
            f"squared distances between images of {shape} and {num_levels} pixel values do not fit into 32 bits; "
            f"at most {2**31 // ((FRACTION + 2) * num_levels**2)} numbers per image are possible"
        )
    leading = (-(-len(images) // block_size), block_size)
    number = np.arange(np.prod(leading))
    # Padding repeats the last image, so that its distances are as large as the others'.
    filled = images if len(number) == len(images) else images[np.minimum(number, len(images) - 1)]
    is_real = (number < len(images)).reshape(leading)
    return Blocks(filled.reshape(*leading, *images.shape[1:]), is_real, num_levels)


class Posterior(NamedTuple):
    """The mean of x_0 given x_t and the entropy of the weights, for a batch.

    x0_mean: E[x_0 | x_t], in [-1, 1].
    entropy_nats: −Σ_i w_i log w_i: 0 if x_t determines the image, log N if all images are equally likely.
    """

    x0_mean: Float[Array, "b h w c"]
    entropy_nats: Float[Array, " b"]


class _Query(NamedTuple):
    """A batch of x_t, prepared so that log w_i is computed without cancellation.

    Let u be an image in pixel values, minus the middle one. With x_t/√ᾱ = whole + parts/8 + … in the same units,
    log w_i = rest·u_i − gain (4 ‖u_i‖² − 8 whole·u_i − parts·u_i) + a constant that all images share. The bracket and
    its difference between two images are integers, computed without error. `rest` stands for at most a 16th of a pixel
    value, unless x_t/√ᾱ lies far outside the pixel values, where gain is small.
    """

    whole: Float[Array, "b d"]
    parts: Float[Array, "b d"]
    rest: Float[Array, "b d"]
    gain: Float[Array, " b"]


class _Sums(NamedTuple):
    """Sums over some images for each x_t, with log w_i relative to an integer reference and to the largest one."""

    reference: Int[Array, "*k b"]  # the smallest bracket (see _Query)
    peak: Float[Array, "*k b"]  # the largest log w_i, relative to the reference
    weight: Float[Array, "*k b"]  # Σ w_i, with log w_i relative to the peak
    weight_log: Float[Array, "*k b"]  # Σ w_i log w_i
    levels: Float[Array, "*k b d"]  # Σ w_i u_i


def posterior(data: Blocks, row: Schedule, x_t: Float[Array, "b h w c"]) -> Posterior:
    """E[x_0 | x_t] and the entropy of the weights, in one pass over the data.

    Args:
        data: leaves [blocks, block, ...].
        row: the schedule's rows of t ≥ 1, leaves [B].
        x_t: the batch.
    """
    sums = _sums(data, _query(data.num_levels, row, x_t))
    mean = sums.levels / sums.weight[:, None]
    half, middle = (data.num_levels - 1) / 2, data.num_levels // 2
    x0_mean = (mean + (middle - half)) / half
    entropy = jnp.log(sums.weight) - sums.weight_log / sums.weight
    return Posterior(x0_mean.reshape(x_t.shape), entropy)


def weights(data: Blocks, row: Schedule, x_t: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
    """The mixture's weights w_i, in the data's order; zeros for padding. It takes two passes."""
    query = _query(data.num_levels, row, x_t)
    sums = _sums(data, query)

    def of_block(block: Blocks) -> Array:
        bracket, rest = _exponents(_centred(block), query, block.num_levels)
        from_reference = query.gain[None] * (bracket - sums.reference[None]).astype(jnp.float32)
        relative = rest - from_reference - sums.peak[None]
        return jnp.where(block.is_real[:, None], jnp.exp(relative), 0.0) / sums.weight[None]

    return jax.lax.map(of_block, data).reshape(-1, len(x_t)).T


def denoiser(data: Blocks, schedule: Schedule, p: Reverse) -> jax.tree_util.Partial:
    """The exact denoiser: (x_t [B, H, W, C], network_t [B]) -> the target of `p` at E[x_0 | x_t].

    `p` must have a fixed variance, because no variance is output. The result is a pytree of `data` and `schedule`, so
    it can be an argument of a compiled function, as part of a `Model`. In a closure, the data would become part of the
    compiled program.
    """
    return jax.tree_util.Partial(_Denoise(p), data, schedule)


@dataclasses.dataclass(frozen=True)
class _Denoise:
    """The function behind `denoiser`. It is equal for equal `p`, so that a program is compiled once."""

    p: Reverse

    def __call__(self, data: Blocks, schedule: Schedule, x_t: Array, network_t: Array) -> Array:
        row = schedule[jnp.searchsorted(schedule.network_t, network_t)]
        return jax.vmap(self._target)(row, x_t, posterior(data, row, x_t).x0_mean)

    def _target(self, row: Schedule, x_t: Array, x0: Array) -> Array:
        eps = (x_t - row.sqrt_alpha_bar * x0) / row.sqrt_one_minus_alpha_bar
        return self.p.target(row, x0, x_t, eps)


def _query(num_levels: int, row: Schedule, x_t: Float[Array, "b h w c"]) -> _Query:
    half, middle = (num_levels - 1) / 2, num_levels // 2
    grid = 2.0 ** (12 + num_levels.bit_length())

    def one(row: Schedule, x_t: Array) -> _Query:
        signal = jnp.maximum(row.sqrt_alpha_bar, 1e-30)  # where √ᾱ = 0, gain and slope are 0
        level = jnp.clip(jnp.round((x_t / signal + 1.0) * half), middle - num_levels, middle + num_levels)
        # √ᾱ · (level/half − 1) as an exact product of two short numbers, plus the remainder.
        per_level = row.sqrt_alpha_bar / (num_levels - 1)
        short = jnp.round(per_level * grid) / grid
        left_over = (row.sqrt_alpha_bar - short * (num_levels - 1)) / (num_levels - 1)
        odd = 2 * level - (num_levels - 1)
        residual = (x_t - short * odd) - left_over * odd
        parts = jnp.clip(jnp.round(FRACTION * half * (residual / signal)), -middle, middle)
        slope = row.sqrt_alpha_bar / row.sqrt_one_minus_alpha_bar**2 / half
        gain = slope * row.sqrt_alpha_bar / half / FRACTION
        return _Query(level - middle, parts, slope * residual - gain * parts, gain)

    return jax.vmap(one)(row, x_t.reshape(len(x_t), -1))


def _sums(data: Blocks, query: _Query) -> _Sums:
    def of_block(block: Blocks) -> _Sums:
        levels = _centred(block)
        bracket, rest = _exponents(levels, query, block.num_levels)
        reference = bracket.min(axis=0)
        log_weight = rest - query.gain[None] * (bracket - reference[None]).astype(jnp.float32)
        peak = log_weight.max(axis=0)
        log_weight -= peak[None]
        weight = jnp.where(block.is_real[:, None], jnp.exp(log_weight), 0.0)
        total_levels = jnp.einsum("nb,nd->bd", weight, levels, precision="highest")
        return _Sums(reference, peak, weight.sum(axis=0), (weight * log_weight).sum(axis=0), total_levels)

    def add(sums: _Sums, k: Array) -> tuple[_Sums, None]:
        both = jax.tree.map(lambda *pair: jnp.stack(pair), sums, of_block(nth(k)))
        return _merge(both, query.gain), None

    def nth(k: int | Array) -> Blocks:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[k], data)

    # The scan is over block numbers, because data[1:] would copy the data.
    sums, _ = jax.lax.scan(add, of_block(nth(0)), jnp.arange(1, len(data.levels)))
    return sums


def _merge(sums: _Sums, gain: Float[Array, " b"]) -> _Sums:
    """The total of the sums over several sets of images, which are stacked along the first axis."""
    reference = sums.reference.min(axis=0, keepdims=True)
    peaks = sums.peak - gain[None] * (sums.reference - reference).astype(jnp.float32)
    peak = peaks.max(axis=0, keepdims=True)
    shift = peaks - peak
    scale = jnp.exp(shift)
    return _Sums(
        reference[0],
        peak[0],
        (scale * sums.weight).sum(axis=0),
        (scale * (sums.weight_log + shift * sums.weight)).sum(axis=0),
        (scale[..., None] * sums.levels).sum(axis=0),
    )


def _centred(block: Blocks) -> Float[Array, "n d"]:
    levels = block.levels.reshape(len(block.levels), -1)
    return levels.astype(jnp.float32) - block.num_levels // 2


def _exponents(
    levels: Float[Array, "n d"], query: _Query, num_levels: int
) -> tuple[Int[Array, "n b"], Float[Array, "n b"]]:
    """The bracket and the rest of log w_i (see _Query)."""

    def products(columns: slice) -> tuple[Array, Array]:
        # Without this precision, accelerators compute float32 products in TensorFloat-32.
        whole, parts, rest = (
            jnp.einsum("nd,bd->nb", levels[:, columns], digits[:, columns], precision="highest")
            for digits in (query.whole, query.parts, query.rest)
        )
        return FRACTION * whole.astype(jnp.int32) + parts.astype(jnp.int32), rest

    # float32 adds integers exactly below 2²⁴. Sums over this many columns stay below.
    step = 2**24 // (num_levels * (num_levels // 2))
    parts = [products(slice(k, k + step)) for k in range(0, levels.shape[1], step)]
    whole, rest = (sum(column) for column in zip(*parts, strict=True))
    square = jnp.square(levels.astype(jnp.int32)).sum(axis=1, keepdims=True)
    return FRACTION // 2 * square - whole, rest
