"""The variational bound, term by term, in bits per dimension.

Ho et al. (2020), eq. 5: −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0, where L_T is the prior's term, L_{t−1} the KL
from q(x_{t−1} | x_t, x_0) to p_θ(x_{t−1} | x_t), and L_0 the cost of decoding x_0 from x_1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion import gaussian, process
from diffusion.batching import if_any
from diffusion.reverse import DECODERS, Denoise, Reverse
from diffusion.schedules import Row, Schedule


class Protocol(NamedTuple):
    """Choices of an evaluation that change the result for the same model.

    decoder: (Gaussian, x, num_levels) -> log mass of each element's pixel value, in nats; None for the model's own.
    decoder_cdf: the decoder's normal CDF, in words.
    images_multiple: only a multiple of this many images is scored; the remainder is dropped.
    clip_x0: whether x̂_0 is clipped to [-1, 1].
    kl_terms: the number of KL terms in the bound of VDM, which `evaluation.limit` scores beside its limit T = ∞; 0 for
        the model's own bound.
    """

    decoder: Callable[..., Array] | None
    decoder_cdf: str
    images_multiple: int
    clip_x0: bool = True
    kl_terms: int = 0


# Numbers in brackets are lines of hojonathanho/diffusion at 1e0dceb, openai/improved-diffusion at 1bc7bbb, and
# google-research/vdm at dc27b98.
PROTOCOLS: dict[str, Protocol] = {
    "exact": Protocol(None, "exact", 1),
    # Ho et al. (2020). diffusion_tf/utils.py has the CDF (112) and the clamp of masses (125). The bound of
    # diffusion_utils_2.py clips x̂_0 (313). Only whole batches of 256 are scored: 9,984 of the 10,000 test images.
    "ho2020": Protocol(gaussian.tanh_discretized_log_prob, "tanh approximation, masses clamped at 1e-12", 256),
    # Nichol & Dhariwal (2021). improved_diffusion/losses.py has the CDF (42) and the clamp (68). scripts/image_nll.py
    # clips x̂_0 (87) and scores as many images as it is told (54). Here these are all.
    "nichol2021": Protocol(gaussian.tanh_discretized_log_prob, "tanh approximation, masses clamped at 1e-12", 1),
    # Kingma et al. (2021). model_vdm.py has pixel values by Bayes' rule (198), and losses of ε̂ itself, without a clip
    # of x̂_0 (116). configs/*.py score T = ∞ (49), for which experiment_vdm.py samples with T = 1000 (78). Its 100
    # batches of 128 test images, an instant each, come from a set that repeats (experiment.py, 270). Here every image
    # is scored.
    "vdm2021": Protocol(None, "none: pixel values by Bayes' rule", 1, clip_x0=False, kl_terms=1000),
}


def bits_per_dim(nats: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, ""]:
    """The mean over an image's dimensions of nats, in bits."""
    return jnp.mean(nats) / math.log(2)


def vlb_term_bpd(
    p: Reverse,
    row: Schedule,
    x0: Float[ArrayLike, "h w c"],
    x_t: Float[ArrayLike, "h w c"],
    output: Float[ArrayLike, "h w c_out"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] | None = None,
) -> Float[ArrayLike, ""]:
    """One term of the bound for one image: L_0 at t = 1, L_{t−1} at t > 1, in bits/dim.

    Args:
        p: the reverse process.
        row: the schedule's row of t.
        x0: the image in [-1, 1], on its pixel values.
        x_t: a sample of q(x_t | x_0).
        output: the network's output for x_t, [h, w, p.output_channels(c)].
        num_levels: how many pixel values the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1]: on in evaluation, off in training (the clip has no gradient).
        decoder: (Gaussian, x0, num_levels) -> log mass of each element, in nats; None for the decoder of `p`.
    """
    p_prev = p(row, x_t, output, clip_x0).p_prev
    log_mass = decoder or DECODERS[p.decoder]
    decoder_nats = if_any(row.t == 1, lambda: -log_mass(p_prev, x0, num_levels))
    kl_nats = gaussian.kl(process.q_posterior(row, x0, x_t), p_prev)
    return bits_per_dim(jnp.where(row.t == 1, decoder_nats, kl_nats))


def prior_bpd(schedule: Schedule, x0: Float[ArrayLike, "h w c"]) -> Float[ArrayLike, ""]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of one image, in bits/dim. Only a learned schedule can change it."""
    standard_normal = gaussian.Gaussian(jnp.zeros_like(x0), jnp.zeros_like(x0))
    return bits_per_dim(gaussian.kl(process.q_marginal(schedule[schedule.num_steps], x0), standard_normal))


def label_bpd(num_classes: int, image_shape: tuple[int, ...]) -> float:
    """The cost of a label, for equally likely classes, in bits/dim of its image.

    The bound given the label plus this cost bounds image and label together, and so the image alone.
    """
    return math.log2(num_classes) / math.prod(image_shape)


def bayes_decoder_bpd(
    row: Row, x0: Float[ArrayLike, "h w c"], eps: Float[ArrayLike, "h w c"], num_levels: int = 256
) -> Float[ArrayLike, ""]:
    """L_0 of one image under the decoder "bayes", in bits/dim. It needs no network.

    Args:
        row: the schedule's row of t = 1.
        x0: the image in [-1, 1], on its pixel values.
        eps: the noise in x_1.
        num_levels: how many pixel values there are.
    """
    # x_1/√ᾱ_1 = x_0 + ε/√SNR_1
    likely = gaussian.Gaussian(x0 + jnp.exp(-0.5 * row.log_snr) * eps, jnp.full_like(x0, -row.log_snr))
    return bits_per_dim(-gaussian.levels_log_prob(likely, x0, num_levels))


# A measurement of one image at one t: (row, x0, x_t, eps, output) -> a tree of numbers.
Measure = Callable[[Row, Array, Array, Array, Array], PyTree]


def term_and_x0_mse(
    p: Reverse,
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] | None = None,
) -> Measure:
    """The bound's term in bits/dim, and the mean squared error of x̂_0 for data in [-1, 1].

    Args: as in `vlb_term_bpd`.
    """

    def measure(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> tuple[Array, Array]:
        x0_hat = p(row, x_t, output, clip_x0).x0_hat
        term = vlb_term_bpd(p, row, x0, x_t, output, num_levels, clip_x0, decoder)
        return term, jnp.mean((x0 - x0_hat) ** 2)

    return measure


def vlb_terms_bpd(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] | None = None,
) -> tuple[Float[ArrayLike, "b steps"], Float[ArrayLike, "b steps"]]:
    """Every term of every image's bound, and the error of every x̂_0, for t = 1…T.

    `bound_bpd` is their sum over t plus `prior_bpd`.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the reverse process.
        schedule: its T rows are scanned.
        x0: images in [-1, 1], on their pixel values.
        keys: one per image. ε is drawn from the key and t, so a term does not depend on the rest of the batch.
        num_levels: how many pixel values the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1].
        decoder: (Gaussian, x0, num_levels) -> log mass of each element, in nats; None for that of `p`.

    Returns:
        The terms [B, T] in bits/dim and the mean squared errors [B, T] of x̂_0 for data in [-1, 1]; entry t − 1 belongs
        to t.
    """
    return over_all_t(denoise, schedule, x0, keys, term_and_x0_mse(p, num_levels, clip_x0, decoder))


def bound_bpd(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] | None = None,
) -> Float[ArrayLike, " b"]:
    """An unbiased estimate of every image's bound, in bits/dim: the sum of its terms, with one ε each, and of the
    prior's term.

    Args: those of `vlb_terms_bpd`.
    """
    terms, _ = vlb_terms_bpd(denoise, p, schedule, x0, keys, num_levels, clip_x0, decoder)
    return terms.sum(axis=1) + jax.vmap(lambda image: prior_bpd(schedule, image))(x0)


def at_one_t(
    denoise: Denoise,
    row: Row,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    measure: Measure,
) -> PyTree:
    """The measure of each image at its own t. `row` is `schedule[t]` for t [B], or an instant for real t.

    ε is drawn from the image's key and t.
    """
    eps = _noise(jax.vmap(jax.random.fold_in)(keys, row.t), x0.shape[1:])
    x_t = jax.vmap(process.q_sample)(row, x0, eps)
    return jax.vmap(measure)(row, x0, x_t, eps, denoise(x_t, row.network_t))


def over_all_t(
    denoise: Denoise,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    measure: Measure,
) -> PyTree:
    """`at_one_t` for t = 1…T, one after another: leaves [B, T], where entry t − 1 belongs to t."""

    def of_one_t(_, row: Schedule):
        rows = jax.tree.map(lambda leaf: jnp.full(len(x0), leaf), row)
        return None, at_one_t(denoise, rows, x0, keys, measure)

    _, terms = jax.lax.scan(of_one_t, None, schedule[1:])
    return jax.tree.map(jnp.transpose, terms)


def log_weights_nats(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] | None = None,
) -> Float[ArrayLike, " b"]:
    """log p_θ(x_{0:T})/q(x_{1:T} | x_0) of one trajectory x_{1:T} ~ q(x_{1:T} | x_0) for each image, in nats.

    Its mean is minus the bound. The mean of its exponential is p_θ(x_0): see `importance_weighted_nats`. The trajectory
    is drawn from its end: x_T ~ q(x_T | x_0), then x_{t−1} ~ q(x_{t−1} | x_t, x_0). So every factor is a ratio of two
    Gaussians that are close to each other.

    Args: those of `vlb_terms_bpd`.
    """
    last = schedule[schedule.num_steps]

    def noise(t: int | Array) -> Array:
        return _noise(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t), x0.shape[1:])

    def log_ratio(x: Array, p: gaussian.Gaussian, q: gaussian.Gaussian) -> Array:
        return jnp.sum(gaussian.log_prob(p, x) - gaussian.log_prob(q, x))

    def prior(x0: Array, eps: Array) -> tuple[Array, Array]:
        marginal = process.q_marginal(last, x0)
        x_t = marginal.sample(eps)
        return x_t, log_ratio(x_t, gaussian.Gaussian(jnp.zeros_like(x0), jnp.zeros_like(x0)), marginal)

    def step(row: Schedule, x0: Array, x_t: Array, output: Array, eps: Array) -> tuple[Array, Array]:
        p_prev = p(row, x_t, output, clip_x0).p_prev
        posterior = process.q_posterior(row, x0, x_t)
        x_prev = posterior.sample(eps)
        decoded = jnp.sum((decoder or DECODERS[p.decoder])(p_prev, x0, num_levels))
        return x_prev, jnp.where(row.t == 1, decoded, log_ratio(x_prev, p_prev, posterior))

    def body(carry: tuple[Array, Array], row: Schedule):
        x_t, log_weights = carry
        output = denoise(x_t, jnp.full(len(x0), row.network_t))
        x_prev, added = jax.vmap(step, in_axes=(None, 0, 0, 0, 0))(row, x0, x_t, output, noise(row.t - 1))
        return (x_prev, log_weights + added), None

    start = jax.vmap(prior)(x0, noise(schedule.num_steps))
    (_, log_weights), _ = jax.lax.scan(body, start, schedule[1:], reverse=True)
    return log_weights


def _noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def importance_weighted_nats(log_weights: Float[ArrayLike, "n samples"], k: int) -> Float[ArrayLike, "n groups"]:
    """log 1/K Σ of K independent weights, for each of the samples/K groups. Its expectation is at most log p_θ(x_0).

    It grows with K, from minus the bound at K = 1 to log p_θ(x_0). Burda, Grosse & Salakhutdinov (2016), theorem 1.

    Raises:
        ValueError: the number of samples is not a multiple of K.
    """
    num_samples = log_weights.shape[-1]
    if not 1 <= k <= num_samples or num_samples % k:
        raise ValueError(f"{num_samples} samples do not make whole groups of K={k}")
    groups = log_weights.reshape(len(log_weights), -1, k)
    return jax.nn.logsumexp(groups, axis=-1) - math.log(k)
