"""Training losses: one number for one example and one t.

An objective is a function (row, x0, x_t, eps, output) -> (loss, parts), made once by `make`. The parts are logged, and
they show which part made a loss NaN or Inf. The caller takes the batch mean once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion import likelihood, process
from diffusion.parameterizations import weighted_error, x0_per_output
from diffusion.reverse import Reverse
from diffusion.schedules import Row, Schedule

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
Objective = Callable[..., Loss]
Weighting = Callable[[Schedule], Array]  # the weight of t's squared error, from the row of t


class Setting(NamedTuple):
    """The setting for which an objective is made."""

    p: Reverse
    num_steps: int  # T
    num_levels: int  # how many pixel values the data have
    weighting: Weighting  # of the simple loss


def unweighted(p: Reverse) -> Weighting:
    """1: the squared error of the prediction as it is."""
    return lambda row: jnp.ones_like(row.log_snr)


def p2(p: Reverse, gamma: float = 1.0) -> Weighting:
    """1/(1 + SNR)^γ for ε, and the equivalent weight for other predictions. P2 of Choi et al. (2022), their k = 1.

    It lowers the weight where SNR is large, where only imperceptible detail is left to learn.
    """
    return _of_x0_error(p, lambda row: row.log_snr - gamma * jax.nn.softplus(row.log_snr))


def min_snr(p: Reverse, gamma: float = 5.0) -> Weighting:
    """min(SNR, γ) for x_0; so min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v: the same loss.

    Source: Hang et al. (2023), section 3.4.

    Raises:
        ValueError: γ ≤ 0.
    """
    if gamma <= 0:
        raise ValueError(f"objective.weighting: gamma={gamma} of min_snr must be above 0")
    return _of_x0_error(p, lambda row: jnp.minimum(row.log_snr, math.log(gamma)))


def sigmoid(p: Reverse, k: float = 2.0) -> Weighting:
    """w(λ) = sigmoid(k − λ) of Kingma & Gao (2023), λ = log SNR; it falls with λ, so the loss bounds data with noise.

    Their weighted loss is L_w = ½ ∫ w(λ) E‖ε − ε̂‖² dλ, whatever the schedule. So the weight of t is the integral of w
    over the step, from λ_t to λ_{t−1}, and L_w is T/2 times the mean loss, per dimension.
    """

    def log_weight(row: Schedule) -> Array:
        # softplus(k − λ_t) − softplus(k − λ_{t−1}), without their subtraction; λ_0 = ∞.
        step = -jnp.log1p(jax.nn.sigmoid(k - row.log_snr) * jnp.expm1(-process.gamma_step(row)))
        # At ᾱ_t = 0 the step is infinite, but SNR times step tends to 0.
        return jnp.where(jnp.isfinite(row.log_snr), jnp.log(step) + row.log_snr, -jnp.inf)

    return _of_x0_error(p, log_weight)


def _of_x0_error(p: Reverse, log_weight: Callable[[Schedule], Array]) -> Weighting:
    """exp(log_weight(row)) times the squared error of x̂_0, as a weight of the prediction's own squared error.

    Given x_t, the prediction is affine in x̂_0. So every such loss is a weighted loss of x̂_0: Salimans & Ho (2022),
    section 4.
    """

    def weight(row: Schedule) -> Array:
        return jnp.exp(log_weight(row) + 2 * jnp.log(jnp.abs(x0_per_output(p, row))))

    return weight


WEIGHTINGS = {
    "none": unweighted,
    "p2": p2,
    "min_snr": min_snr,
    "sigmoid": sigmoid,
}


def simple(setting: Setting) -> Objective:
    """The mean squared error of the prediction times its weight. For ε it is L_simple of Ho et al. (2020), eq. 14.

    The part "mse" is the error without the weight.
    """

    def loss(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> Loss:
        predicted, _ = setting.p.split(output)
        mse = jnp.mean((setting.p.target(row, x0, x_t, eps) - predicted) ** 2)
        return setting.weighting(row) * mse, {"mse": mse}

    return loss


def vlb(setting: Setting) -> Objective:
    """T times the bound's term: for uniform t an unbiased estimate of the bound without the prior term, in bits/dim.

    Ho et al. (2020), eq. 5. x̂_0 is not clipped: the clip would have no gradient.
    """

    def loss(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> Loss:
        term = likelihood.vlb_term_bpd(setting.p, row, x0, x_t, output, setting.num_levels, clip_x0=False)
        bpd = setting.num_steps * term
        return bpd, {"vlb_bpd": bpd}

    return loss


def hybrid(setting: Setting, vlb_weight: float = 0.001) -> Objective:
    """L_simple + 0.001 L_vlb, where the bound trains the variance only. Nichol & Dhariwal (2021), eq. 16.

    Raises:
        ValueError: vlb_weight < 0.
    """
    if vlb_weight < 0:
        raise ValueError(f"objective.name: vlb_weight={vlb_weight} of hybrid must be at least 0")
    of_mean, of_variance = simple(setting), vlb(setting)

    def loss(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> Loss:
        predicted, raw_variance = setting.p.split(output)
        weighted_mse, parts = of_mean(row, x0, x_t, eps, output)
        variance_only = jnp.concatenate([jax.lax.stop_gradient(predicted), raw_variance], axis=-1)
        bpd, bound_parts = of_variance(row, x0, x_t, eps, variance_only)
        return weighted_mse + vlb_weight * bpd, parts | bound_parts

    return loss


def npr(setting: Setting) -> Objective:
    """L_simple + ‖(ε − ε̂)² − g‖², where g is the network's second half; the second term holds ε̂ fixed.

    The best g is E[(ε − ε̂)² | x_t], from which model.variance=npr makes the optimal variance of this ε̂. NPR-DDPM: Bao
    et al. (2022, "Estimating the optimal covariance with imperfect mean"), who train g on a finished network.
    """

    def target(row: Schedule, x0: Array, x_t: Array, eps: Array, predicted: Array) -> Array:
        return _eps_error(setting.p, row, x0, x_t, eps, predicted) ** 2

    return _beside_simple(setting, target)


def sn(setting: Setting) -> Objective:
    """L_simple + ‖ε² − h‖² with h = g + ε̂², where g is the network's second half; the second term holds ε̂ fixed.

    The best h is E[ε² | x_t]. So the best g is Var(ε | x_t), if ε̂ is the mean of ε. SN-DDPM: Bao et al. (2022,
    "Estimating the optimal covariance with imperfect mean"), whose network outputs h.
    """

    def target(row: Schedule, x0: Array, x_t: Array, eps: Array, predicted: Array) -> Array:
        error = _eps_error(setting.p, row, x0, x_t, eps, predicted)
        return error * (2 * eps - error)  # ε² − ε̂²

    return _beside_simple(setting, target)


def ocm(setting: Setting) -> Objective:
    """L_simple + ‖v ⊙ √ᾱ_t J v − g‖², with J = ∂x̂_0/∂x_t held fixed and random signs v (see PROBED).

    The mean of v ⊙ √ᾱ_t J v over v is √ᾱ_t diag J, so this is the best g. If x̂_0 is exact, this is the diagonal of
    Cov(ε | x_t) = I + (1 − ᾱ_t) ∇² log q_t. OCM: Ou et al. (2024, arXiv 2406.10808).
    """

    def target(
        row: Schedule, x0: Array, x_t: Array, eps: Array, predicted: Array, probe: Array, slope: Array
    ) -> Array:
        along_probe, _ = setting.p.split(slope)
        # x̂_0 is linear in x_t and the output, so J v is the x̂_0 of both of their derivatives.
        return probe * row.sqrt_alpha_bar * setting.p.meaning.to_x0(row, probe, along_probe)

    return _beside_simple(setting, target)


def _eps_error(p: Reverse, row: Schedule, x0: Array, x_t: Array, eps: Array, predicted: Array) -> Array:
    """ε − ε̂ of any prediction: given x_t, the prediction is affine in x̂_0, and x̂_0 in ε̂."""
    x0_error = (p.target(row, x0, x_t, eps) - predicted) * x0_per_output(p, row)
    return -jnp.exp(0.5 * row.log_snr) * x0_error


def _beside_simple(setting: Setting, target: Callable[..., Array]) -> Objective:
    """L_simple + ‖target − g‖², where g is the network's second half; the target has no gradient."""
    of_mean = simple(setting)

    def loss(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array, *probed: Array) -> Loss:
        predicted, g = setting.p.split(output)
        weighted_mse, parts = of_mean(row, x0, x_t, eps, output)
        wanted = jax.lax.stop_gradient(target(row, x0, x_t, eps, predicted, *probed))
        residual_mse = jnp.mean((wanted - g) ** 2)
        return weighted_mse + residual_mse, parts | {"residual_mse": residual_mse}

    return loss


def vdm(setting: Setting) -> Objective:
    """T − 1 times one KL term of t > 1, in bits/dim, or the continuous-time loss at an instant between steps.

    For uniform t it is an unbiased estimate of the bound without the prior's and the decoder's terms. The train step
    adds these two terms to every example. With the variance β̃_t the KL is a squared error, so the code subtracts no
    two means. Sources are eqs. 14 and 17 of Kingma et al. (2021, VDM): (T − 1)/2 expm1(γ_t − γ_{t−1}) ‖ε − ε̂‖², and ½
    γ' ‖ε − ε̂‖².
    """

    def loss(row: Row, x0: Array, x_t: Array, eps: Array, output: Array) -> Loss:
        nats = weighted_error(setting.p, row, x0, x_t, eps, output)
        bpd = (setting.num_steps - 1) * likelihood.bits_per_dim(nats)
        return bpd, {"kl_bpd": bpd}

    return loss


OBJECTIVES = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "npr": npr,
    "sn": sn,
    "ocm": ocm,
    "vdm": vdm,
    "vdm_continuous": vdm,
}

# Objectives that estimate the bound, so they can train a schedule.
BOUNDS = ("vlb", "vdm", "vdm_continuous")
# Objectives that train the second half of the output to be the variance of ε, for model.variance=npr.
OF_EPS_VARIANCE = ("npr", "sn", "ocm")
# Objectives that also take, after `output`, random signs v (`probe`) and the output's derivative ∂output/∂x_t v.
PROBED = ("ocm",)
# Objective -> its kind of t, one of `timesteps.TIMES`. All others take every t of 1…T.
TIMES = {"vdm": "kl_terms", "vdm_continuous": "continuous"}


def make(
    objective: str,
    p: Reverse,
    num_steps: int,
    num_levels: int = 256,
    weighting: Weighting | None = None,
    **arguments: float,
) -> Objective:
    """The objective with this name.

    Args:
        objective: one of OBJECTIVES.
        p: the reverse process.
        num_steps: T.
        num_levels: how many pixel values the data have.
        weighting: the weight of the simple loss, from one of WEIGHTINGS; None for no weight.
        arguments: the objective's own arguments, such as hybrid's vlb_weight.

    Returns:
        (row, x0 [H, W, C], x_t, eps, output [H, W, p.output_channels(C)]) -> the loss and its named parts.
    """
    setting = Setting(p, num_steps, num_levels, weighting or unweighted(p))
    return OBJECTIVES[objective](setting, **arguments)
