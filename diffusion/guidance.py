"""Labels and guidance: a network that is given labels becomes a denoiser before any sampler or bound sees it.

    network(x_t [B, H, W, C], network_t [B], labels [B]) -> output        becomes
    denoise(x_t [B, H, W, C], network_t [B]) -> output
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Real

from diffusion.reverse import Denoise

NO_LABEL = -1  # what the network is given for an example whose label it shall not know

Conditional = Callable[[Array, Array, Array], Array]


def conditional(network: Conditional, labels: Int[ArrayLike, " b"]) -> Denoise:
    """The network, given the label of each example of the batch."""
    return jax.tree_util.Partial(_conditional, _as_pytree(network), labels)


def unconditional(network: Conditional) -> Denoise:
    """The network without any label, which it knows if labels were left out in training."""
    return jax.tree_util.Partial(_unconditional, _as_pytree(network))


def classifier_free(
    network: Conditional,
    labels: Int[ArrayLike, " b"],
    scale: float | int,
    interval: tuple[float | int, ...] = (),
) -> Denoise:
    """Classifier-free guidance: away from what the network says without a label, by `scale` times the difference.

    ε = (1 + w) ε_c − w ε_u with w = `scale`: 0 is the conditional model, −1 has the mean of the unconditional one.
    (Others write s = 1 + w.) The same combination of x̂_0, v or the mean is the same ε, because at a given x_t each is
    an affine function of ε and the two weights sum to one. What the output says of a variance is always that of the
    conditional half.

    Sources: Ho & Salimans (2022), eq. 6; the interval, Kynkäänniemi et al. (2024).

    Args:
        network: trained with and without labels.
        labels: of each example.
        scale: w.
        interval: (low, high), any real numbers: guided where low < t ≤ high, in steps of the schedule that was trained
            with, and conditional elsewhere, for half of the work; () for every t.
    """
    given_labels = conditional(network, labels)
    if scale == 0:
        return given_labels
    guided = jax.tree_util.Partial(_guided, _as_pytree(network), labels, scale)
    return _within(interval, guided, given_labels)


def autoguided(
    network: Callable[..., Array],
    guide: Callable[..., Array],
    scale: float | int,
    interval: tuple[float | int, ...] = (),
) -> jax.tree_util.Partial:
    """Autoguidance: away from what a worse network says, by `scale` times the difference; for half of the speed.

    ε = (1 + w) ε − w ε_guide with w = `scale`; the authors write 1 + w. The worse network is a smaller one, or one that
    was trained for fewer steps, with the same prediction and the same noise at each network_t. Its variance is not
    used.

    Source: Karras et al. (2024, arXiv 2406.02507).

    Args:
        network: (x_t, network_t) -> output, or a network with labels, (x_t, network_t, labels) -> output.
        guide: the worse one, a function of the same arguments.
        scale: w.
        interval: the t that are guided, as in `classifier_free`.

    Returns:
        A function of the same arguments.
    """
    network = _as_pytree(network)
    return _within(interval, jax.tree_util.Partial(_autoguided, network, _as_pytree(guide), scale), network)


def blind(network: Denoise) -> jax.tree_util.Partial:
    """A network without labels in the place of one with labels, to guide it."""
    return jax.tree_util.Partial(_blind, _as_pytree(network))


def _within(interval: tuple[float | int, ...], guided: Denoise, otherwise: Denoise) -> Denoise:
    if not interval:
        return guided
    # t is an integer, so the ends count as rounded down: exact, where float32 could round 2.9999999999 up to 3.
    low, high = (float(np.floor(end)) for end in interval)
    return jax.tree_util.Partial(_guided_within, guided, otherwise, low, high)


def _conditional(
    network: Conditional, labels: Int[ArrayLike, " b"], x_t: Float[Array, "b h w c"], network_t: Real[Array, " b"]
) -> Float[Array, "b h w out"]:
    return network(x_t, network_t, jnp.asarray(labels))


def _unconditional(
    network: Conditional, x_t: Float[Array, "b h w c"], network_t: Real[Array, " b"]
) -> Float[Array, "b h w out"]:
    return network(x_t, network_t, jnp.full(len(x_t), NO_LABEL))


def _guided(
    network: Conditional,
    labels: Int[ArrayLike, " b"],
    scale: ArrayLike,
    x_t: Float[Array, "b h w c"],
    network_t: Real[Array, " b"],
) -> Float[Array, "b h w out"]:
    """Both halves go through the network as one batch."""
    with_and_without = jnp.concatenate([jnp.asarray(labels), jnp.full_like(labels, NO_LABEL)])
    outputs = network(jnp.concatenate([x_t, x_t]), jnp.concatenate([network_t, network_t]), with_and_without)
    of_label, of_none = jnp.split(outputs, 2)
    return _away(of_label, of_none, scale, x_t.shape[-1])


def _autoguided(
    network: Callable[..., Array],
    guide: Callable[..., Array],
    scale: ArrayLike,
    x_t: Float[Array, "b h w c"],
    network_t: Real[Array, " b"],
    *labels: Int[Array, " b"],
) -> Float[Array, "b h w out"]:
    return _away(network(x_t, network_t, *labels), guide(x_t, network_t, *labels), scale, x_t.shape[-1])


def _blind(network: Denoise, x_t: Array, network_t: Array, labels: Array) -> Array:
    return network(x_t, network_t)


def _away(output: Array, other: Array, scale: ArrayLike, channels: int) -> Array:
    """(1 + w) of the one's prediction less w of the other's; the one's variance."""
    predicted = (1 + scale) * output[..., :channels] - scale * other[..., :channels]
    return jnp.concatenate([predicted, output[..., channels:]], axis=-1)


def _guided_within(
    guided: Callable[..., Array],
    otherwise: Callable[..., Array],
    low: ArrayLike,
    high: ArrayLike,
    x_t: Float[Array, "b h w c"],
    network_t: Real[Array, " b"],
    *labels: Int[Array, " b"],
) -> Float[Array, "b h w out"]:
    """In a sampler all examples have the same t. network_t is t − 1."""
    t = network_t[0] + 1
    is_within = (low < t) & (t <= high)
    return jax.lax.cond(is_within, guided, otherwise, x_t, network_t, *labels)


def _as_pytree(network: Conditional) -> Conditional:
    """A network that may be a part of a compiled function's argument."""
    return network if isinstance(network, jax.tree_util.Partial) else jax.tree_util.Partial(network)
