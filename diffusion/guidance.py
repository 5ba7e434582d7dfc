"""Labels and guidance: they turn a network with labels into a denoiser, before any sampler or bound sees it.

    network(x_t [B, H, W, C], network_t [B], labels [B]) -> output        becomes
    denoise(x_t [B, H, W, C], network_t [B]) -> output
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from diffusion.reverse import Denoise
from diffusion.schedules import Schedule

TOLERANCE = 1e-5  # tables that differ by less count as equal
BEYOND = 1e-3  # in log SNR: a guide is evaluated up to this far beyond the ends of its schedule
NO_SIGNAL = 1e6  # of −log SNR, instead of infinity
NO_LABEL = -1  # the network's input for an example without a label

Conditional = Callable[[Array, Array, Array], Array]


def conditional(network: Conditional, labels: Int[ArrayLike, " b"]) -> Denoise:
    """The network with the label of each example of the batch."""
    return jax.tree_util.Partial(_conditional, _as_pytree(network), labels)


def unconditional(network: Conditional) -> Denoise:
    """The network without any label. It must be trained with label dropout."""
    return jax.tree_util.Partial(_unconditional, _as_pytree(network))


def classifier_free(
    network: Conditional,
    labels: Int[ArrayLike, " b"],
    scale: float | int,
    interval: tuple[float | int, ...] = (),
) -> Denoise:
    """Classifier-free guidance: moves away from the prediction without a label, by `scale` times the difference.

    ε = (1 + w) ε_c − w ε_u with w = `scale`. w = 0 is the conditional model; w = −1 has the mean of the unconditional
    one. (Others write s = 1 + w.) Combining x̂_0, v or the mean in this way gives the same ε, because at a given x_t
    each is an affine function of ε and the two weights sum to one. The variance is always that of the conditional
    output.

    Sources: Ho & Salimans (2022), eq. 6; the interval, Kynkäänniemi et al. (2024).

    Args:
        network: trained with and without labels.
        labels: the label of each example.
        scale: w.
        interval: (low, high), any real numbers: guided where low < t ≤ high, in steps of the training schedule.
            Elsewhere the model is conditional, for half of the work. () guides every t.
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
    clock: "Clock | None" = None,
) -> jax.tree_util.Partial:
    """Autoguidance: moves the prediction away from a worse network's, by `scale` times the difference.

    ε = (1 + w) ε − w ε_guide with w = `scale`; the authors write 1 + w. The worse network is smaller or was trained for
    fewer steps, and has the same kind of prediction. Its variance is not used. Sampling takes up to twice the time.

    Source: Karras et al. (2024, arXiv 2406.02507).

    Args:
        network: (x_t, network_t) -> output, or a network with labels, (x_t, network_t, labels) -> output.
        guide: the worse network, a function of the same arguments.
        scale: w.
        interval: the t that are guided, as in `classifier_free`.
        clock: from `clock`, for a guide with another noise schedule; None if equal network_t means equal noise. With
            the prediction "mean" the guide needs the same steps, because μ̃_t also depends on the noise at t − 1.

    Returns:
        A function of the same arguments.
    """
    network = _as_pytree(network)
    return _within(interval, jax.tree_util.Partial(_autoguided, network, _as_pytree(guide), scale, clock), network)


class Clock(NamedTuple):
    """The network_t for a guide with another noise schedule: the one at which the guide has learned the same noise.

    Between two steps of either schedule, network_t is linear in log SNR, as in `continuous_time`.

    Attributes:
        own_t, own_log_snr: network_t and log SNR of the schedule that is sampled from, for t = 1…T.
        its_t, its_log_snr: the same for the guide's schedule.
    """

    own_t: Float[ArrayLike, " steps"]
    own_log_snr: Float[ArrayLike, " steps"]
    its_t: Float[ArrayLike, " its_steps"]
    its_log_snr: Float[ArrayLike, " its_steps"]

    def __call__(self, network_t: Real[Array, " b"]) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
        """The guide's network_t, and whether its schedule has this noise."""
        log_snr = jnp.interp(network_t, jnp.asarray(self.own_t), jnp.asarray(self.own_log_snr))
        falling = jnp.asarray(self.its_log_snr)
        is_known = (falling[-1] - BEYOND <= log_snr) & (log_snr <= falling[0] + BEYOND)
        return jnp.interp(-log_snr, -falling, jnp.asarray(self.its_t)), is_known


def clock(own: Schedule, its: Schedule) -> Clock | None:
    """The clock of a guide; None if both schedules have the same noise at the same network_t.

    Args:
        own: the full schedule that is sampled from, before a grid chooses steps.
        its: the guide's schedule.

    Raises:
        ValueError: one of them scales the data, so equal log SNR means another noise in x_t.
    """
    if own.x0_scale is not None or its.x0_scale is not None:
        raise ValueError("a schedule with an x0_scale can neither guide nor be guided by another model")
    tables = [np.asarray(table)[1:] for of in (own, its) for table in (of.network_t, of.log_snr)]
    pairs = zip(tables[:2], tables[2:], strict=True)
    if all(a.shape == b.shape and np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs):
        return None
    own_t, own_log_snr, its_t, its_log_snr = (table.astype(np.float32) for table in tables)
    has_signal = np.isfinite(its_log_snr)
    # Our steps without signal are below every log SNR of the guide, so they are not guided.
    return Clock(own_t, np.maximum(own_log_snr, -NO_SIGNAL), its_t[has_signal], its_log_snr[has_signal])


def blind(network: Denoise) -> jax.tree_util.Partial:
    """A network without labels that takes labels and ignores them, so that it can guide one with labels."""
    return jax.tree_util.Partial(_blind, _as_pytree(network))


def _within(interval: tuple[float | int, ...], guided: Denoise, otherwise: Denoise) -> Denoise:
    if not interval:
        return guided
    low, high = map(_rounded_down, interval)
    return jax.tree_util.Partial(_guided_within, guided, otherwise, low, high)


def _rounded_down(end: float | int) -> float:
    """The largest float32 that is not above `end`: t is a float32, so comparing it gives the same result."""
    with np.errstate(over="ignore"):  # infinity is above 1e299
        nearest = np.float32(end)
    return float(nearest if float(nearest) <= end else np.nextafter(nearest, np.float32(-np.inf)))


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
    clock: Clock | None,
    x_t: Float[Array, "b h w c"],
    network_t: Real[Array, " b"],
    *labels: Int[Array, " b"],
) -> Float[Array, "b h w out"]:
    output = network(x_t, network_t, *labels)
    if clock is not None:
        network_t, is_known = clock(network_t)
        scale = jnp.where(is_known, scale, 0.0)[:, None, None, None]
    return _away(output, guide(x_t, network_t, *labels), scale, x_t.shape[-1])


def _blind(network: Denoise, x_t: Array, network_t: Array, labels: Array) -> Array:
    return network(x_t, network_t)


def _away(output: Array, other: Array, scale: ArrayLike, channels: int) -> Array:
    """(1 + w) times one prediction minus w times the other, with the variance of the first."""
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
    """The guided output if t is in (low, high]. In a sampler all examples have the same t. network_t is t − 1."""
    t = network_t[0] + 1
    is_within = (low < t) & (t <= high)
    return jax.lax.cond(is_within, guided, otherwise, x_t, network_t, *labels)


def _as_pytree(network: Conditional) -> Conditional:
    """The network as a pytree, which can be part of a compiled function's argument."""
    return network if isinstance(network, jax.tree_util.Partial) else jax.tree_util.Partial(network)
