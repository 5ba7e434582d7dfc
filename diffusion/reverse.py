"""The reverse process p_θ(x_{t−1} | x_t): the network's prediction and the source of the variance.

`make` picks one entry each of PREDICTIONS, VARIANCES and DECODERS below, so a new idea is a new entry. Everything is
for one example and one row of the schedule.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from diffusion import gaussian, process
from diffusion.gaussian import Gaussian
from diffusion.schedules import Row, Schedule

# A network as a function: (x_t [B, H, W, C], network_t [B]) -> output [B, H, W, Reverse.output_channels(C)].
Denoise = Callable[[Array, Array], Array]


class Prediction(NamedTuple):
    """The meaning of the network's output.

    target: (row, x0, x_t, eps) -> the output of a perfect network.
    to_x0: (row, x_t, output) -> the x̂_0 that corresponds to this output.
    """

    target: Callable[..., Array]
    to_x0: Callable[..., Array]


class Variance(NamedTuple):
    """The source of log σ_t².

    log_var: (row, raw) -> log σ_t²; `raw` is the network's second half, or zeros if it has none.
    is_learned: whether the network has that second half.
    """

    log_var: Callable[..., Array]
    is_learned: bool


def edm(sigma_data: float = 0.5) -> Prediction:
    """The network F of x̂_0 = c_skip x + c_out F, where x = x_t/√ᾱ_t has noise of σ = 1/√SNR_t.

    c_skip and c_out are those of Karras et al. (2022, EDM), eq. 7 and table 1. For data with the standard deviation
    `sigma_data`, F then has the variance 1, and its squared error is their weighted loss. At sigma_data = 1, F is −v
    and the network's input x_t equals c_in x. For other sigma_data x_t is c_in x times a factor between sigma_data and
    1.

    Raises:
        ValueError: sigma_data ≤ 0.
    """
    if sigma_data <= 0:
        raise ValueError(f"model.prediction: sigma_data={sigma_data} of edm must be above 0")

    def std(row: Row) -> Array:
        """The standard deviation of x_t: √ᾱ_t/c_in."""
        return jnp.hypot(sigma_data * row.sqrt_alpha_bar, row.sqrt_one_minus_alpha_bar)

    def target(row: Row, x0: Array, x_t: Array, eps: Array) -> Array:
        signal, noise = sigma_data * row.sqrt_alpha_bar, row.sqrt_one_minus_alpha_bar
        return (noise * x0 / sigma_data - signal * eps) / std(row)

    def to_x0(row: Row, x_t: Array, f: Array) -> Array:
        c_out = sigma_data * row.sqrt_one_minus_alpha_bar / std(row)
        of_x_t = sigma_data**2 * row.sqrt_alpha_bar / std(row) ** 2  # c_skip/√ᾱ_t, which is finite at ᾱ_T = 0
        return of_x_t * x_t + c_out * f

    return Prediction(target, to_x0)


# Name -> the meaning of the prediction, or a function that makes it from a config's arguments.
PREDICTIONS: dict[str, Prediction | Callable[..., Prediction]] = {
    # x_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t: eq. 4 of Ho et al. (2020) solved for x_0; their choice.
    "eps": Prediction(
        target=lambda row, x0, x_t, eps: eps,
        to_x0=lambda row, x_t, eps: (x_t - row.sqrt_one_minus_alpha_bar * eps) / row.sqrt_alpha_bar,
    ),
    "x0": Prediction(
        target=lambda row, x0, x_t, eps: x0,
        to_x0=lambda row, x_t, x0: x0,
    ),
    # v = √ᾱ_t ε − √(1−ᾱ_t) x_0: Salimans & Ho (2022), section 4.
    # With an `x0_scale` the squares of these roots do not add up to 1.
    "v": Prediction(
        target=lambda row, x0, x_t, eps: row.sqrt_alpha_bar * eps - row.sqrt_one_minus_alpha_bar * x0,
        to_x0=lambda row, x_t, v: (row.sqrt_alpha_bar * x_t - row.sqrt_one_minus_alpha_bar * v)
        / (1.0 if row.x0_scale is None else row.sqrt_alpha_bar**2 + row.sqrt_one_minus_alpha_bar**2),
    ),
    # u = ε − x_0, the velocity of the linear path (1 − s) x_0 + s ε: Liu et al. (2023, rectified flow), eq. 1. The path
    # is x_t/(√ᾱ_t + √(1−ᾱ_t)), so every schedule runs along it, `schedules.rectified_flow` in even steps of s.
    "velocity": Prediction(
        target=lambda row, x0, x_t, eps: eps - x0,
        to_x0=lambda row, x_t, u: (x_t - row.sqrt_one_minus_alpha_bar * u)
        / (row.sqrt_alpha_bar + row.sqrt_one_minus_alpha_bar),
    ),
    "edm": edm,
    # μ̃_t(x_t, x_0), eq. 7 of Ho et al. (2020), solved for x_0.
    "mean": Prediction(
        target=lambda row, x0, x_t, eps: process.q_posterior(row, x0, x_t).mean,
        to_x0=lambda row, x_t, mean: (mean - row.posterior_x_t * x_t) / row.posterior_x0,
    ),
}


def _learned_range(row: Schedule, raw: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """Interpolates from log β̃_t at raw = −1 to log β_t at raw = 1. Nichol & Dhariwal (2021), eq. 15.

    The upper end is log β_t itself even at t = 1, where fixed_large takes β̃_2 instead.
    """
    fraction = (raw + 1) / 2
    return fraction * row.log_beta + (1 - fraction) * row.log_beta_tilde


def _optimal(row: Schedule, raw: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """σ*_t² = β̃_t + (coefficient of x_0 in μ̃_t)² E Var(x_0 | x_t). Bao et al. (2022, Analytic-DPM), theorem 1.

    At t = 1 the decoder keeps the width of the fixed variances, as in that paper's evaluation, because its bins are not
    Gaussian.
    """
    if row.x0_variance is None:
        raise ValueError("variance='optimal' needs a schedule whose x0_variance was estimated (see variances.py)")
    return _with_x0_variance(row, jnp.full_like(raw, row.x0_variance))


def _npr(row: Schedule, raw: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """β̃_t + (coefficient of x_0 in μ̃_t)² E[(x_0 − x̂_0)² | x_t] of each element: the optimum for the learned mean.

    `raw` is E[(ε − ε̂)² | x_t], which `objectives.npr` trains. It is SNR_t times the same for x_0, which is clipped to
    [0, 1] as in the authors' code. With `sn` and `ocm`, `raw` is Var(ε | x_t), which is equal if ε̂ is exact. Bao et
    al. (2022, "Estimating the optimal covariance with imperfect mean"), Ou et al. (2024, arXiv 2406.10808).
    """
    # If ᾱ_T = 0, 1/SNR is ∞, and a network that starts with zeros would give 0 · ∞.
    x0_variance = jnp.where(raw == 0, 0.0, raw * jnp.exp(-row.log_snr))
    return _with_x0_variance(row, jnp.clip(x0_variance, 0.0, 1.0))


def _with_x0_variance(row: Schedule, x0_variance: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    added = row.posterior_x0**2 * x0_variance * jnp.exp(-row.log_beta_tilde)
    return row.log_beta_tilde + jnp.log1p(jnp.where(row.t > 1, added, 0.0))


VARIANCES: dict[str, Variance] = {
    # Ho et al. (2020), section 3.2: the two extremes, optimal if x_0 is one point, and if x_0 ~ N(0, I).
    "fixed_small": Variance(lambda row, raw: jnp.full_like(raw, row.log_beta_tilde), is_learned=False),
    "fixed_large": Variance(lambda row, raw: jnp.full_like(raw, row.log_beta_large), is_learned=False),
    "optimal": Variance(_optimal, is_learned=False),
    "learned": Variance(lambda row, raw: raw, is_learned=True),
    "learned_range": Variance(_learned_range, is_learned=True),
    "npr": Variance(_npr, is_learned=True),
}


# p(x_0 | x_1): (Gaussian, x_0, num_levels) -> log mass of each element's pixel value, in nats.
DECODERS: dict[str, Callable[..., Array]] = {
    # The mass of the network's Gaussian on each bin: Ho et al. (2020), eq. 13.
    "network": gaussian.discretized_log_prob,
    # Proportional to q(x_1 | x_0), without the network: Kingma et al. (2021, VDM), section 3.3.
    "bayes": gaussian.levels_log_prob,
}


class Denoised(NamedTuple):
    """The result of `Reverse` for one x_t."""

    p_prev: Gaussian  # p_θ(x_{t−1} | x_t)
    x0_hat: Array  # x̂_0


@dataclasses.dataclass(frozen=True)
class Reverse:
    """p_θ(x_{t−1} | x_t) as a function of a row, x_t and the network's output."""

    prediction: str
    variance: str
    decoder: str = "network"
    # The prediction's arguments. The digest of a coded file has them in model.prediction, so the repr omits them.
    arguments: tuple[tuple[str, float], ...] = dataclasses.field(default=(), repr=False)

    @functools.cached_property
    def meaning(self) -> Prediction:
        """The meaning of the prediction."""
        found = PREDICTIONS[self.prediction]
        return found if isinstance(found, Prediction) else found(**dict(self.arguments))

    @property
    def learns_variance(self) -> bool:
        """Whether the network also outputs a variance."""
        return VARIANCES[self.variance].is_learned

    def output_channels(self, channels: int) -> int:
        """The number of output channels of the network for images with `channels` channels."""
        return 2 * channels if self.learns_variance else channels

    def split(
        self, output: Float[ArrayLike, "*shape c_out"]
    ) -> tuple[Float[ArrayLike, "*shape c"], Float[ArrayLike, "*shape c"]]:
        """The network's output as (prediction, raw variance). The latter is zeros if the variance is not learned."""
        if self.learns_variance:
            return tuple(jnp.split(output, 2, axis=-1))
        return output, jnp.zeros_like(output)

    def target(
        self,
        row: Row,
        x0: Float[ArrayLike, "*shape"],
        x_t: Float[ArrayLike, "*shape"],
        eps: Float[ArrayLike, "*shape"],
    ) -> Float[ArrayLike, "*shape"]:
        """The output of an exact denoiser, or the target in training."""
        return self.meaning.target(row, x0, x_t, eps)

    def __call__(
        self,
        row: Schedule,
        x_t: Float[ArrayLike, "*shape c"],
        output: Float[ArrayLike, "*shape c_out"],
        clip_x0: bool = True,
    ) -> Denoised:
        """p_θ(x_{t−1} | x_t) and x̂_0.

        The mean is μ̃_t(x_t, x̂_0), which for ε is eq. 11 of Ho et al. (2020). If the network predicts the mean itself,
        its prediction is the mean, and the clip changes only the returned x̂_0.

        Args:
            row: the schedule's row of t.
            x_t: [H, W, C].
            output: the network's output, [H, W, output_channels(C)].
            clip_x0: clip x̂_0 to [-1, 1], as Ho et al. do in sampling and evaluation.

        Raises:
            ValueError: `output` has the wrong number of channels for x_t.
        """
        wanted = self.output_channels(x_t.shape[-1])
        if output.shape[-1] != wanted:
            raise ValueError(
                f"for x_t {x_t.shape} with variance={self.variance!r} the network must output {wanted} channels, "
                f"not {output.shape[-1]}"
            )
        predicted, raw = self.split(output)
        x0_hat = self.meaning.to_x0(row, x_t, predicted)
        if clip_x0:
            x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
        mean = predicted if self.prediction == "mean" else process.q_posterior(row, x0_hat, x_t).mean
        p_prev = Gaussian(mean, VARIANCES[self.variance].log_var(row, raw))
        return Denoised(self.decoding(row, x_t, p_prev), x0_hat)

    def decoding(self, row: Schedule, x_t: Float[ArrayLike, "*shape"], p_prev: Gaussian) -> Gaussian:
        """p_prev for t > 1. At t = 1 it is the Gaussian that the decoder reads; "bayes" has its own Gaussian.

        q(x_1 | x_0) as a function of x_0 is proportional to N(x_0; x_1/√ᾱ_1, (1 − ᾱ_1)/ᾱ_1).
        """
        if self.decoder == "network":
            return p_prev
        is_decoder = row.t == 1
        mean = jnp.where(is_decoder, x_t / row.sqrt_alpha_bar, p_prev.mean)
        return Gaussian(mean, jnp.where(is_decoder, -row.log_snr, p_prev.log_var))

    def level_probs(self, p_prev: Gaussian, num_levels: int) -> Float[Array, "*shape num_levels"]:
        """p(x_0 | x_1): the probability of every pixel value. The bound uses only the probability of x_0 itself.

        Args:
            p_prev: the result of `__call__` at t = 1.
            num_levels: how many pixel values there are.
        """

        def log_prob(level: Float[Array, ""]) -> Float[Array, "*shape"]:
            return DECODERS[self.decoder](p_prev, jnp.full_like(p_prev.mean, level), num_levels)

        return jnp.exp(jax.vmap(log_prob, out_axes=-1)(jnp.linspace(-1.0, 1.0, num_levels)))


def make(prediction: str, variance: str, decoder: str = "network", **arguments: float) -> Reverse:
    """The reverse process with this prediction, variance and decoder, each given by name.

    Args:
        prediction: one of PREDICTIONS.
        variance: "fixed_small" (β̃_t), "fixed_large" (β_t), "optimal" (σ*_t², estimated from data and the trained
            mean), "learned" (the network outputs log σ_t²), "learned_range" (it outputs the position between β̃_t and
            β_t on a log scale) or "npr" (it outputs the variance of ε).
        decoder: "network" (p(x_0 | x_1) is the network's Gaussian on bins) or "bayes" (proportional to q(x_1 | x_0)).
        arguments: the prediction's own arguments, such as edm's sigma_data.

    Raises:
        ValueError: an unknown name, or an argument out of its range.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"model.prediction={prediction!r} is not one of {', '.join(PREDICTIONS)}")
    if variance not in VARIANCES:
        raise ValueError(f"model.variance={variance!r} is not one of {', '.join(VARIANCES)}")
    if decoder not in DECODERS:
        raise ValueError(f"model.decoder={decoder!r} is not one of {', '.join(DECODERS)}")
    made = Reverse(prediction, variance, decoder, tuple(sorted(arguments.items())))
    _ = made.meaning  # raises its ValueError now, not at the first use
    return made
