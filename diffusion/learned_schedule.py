"""A noise schedule that is trained with the network: the discrete-time form of Kingma et al. (2021, VDM).

Its parameters are γ_1, log(γ_T − γ_1) and T − 1 logits, with γ_t = −log SNR_t. The softmax of the logits divides the
distance from γ_1 to γ_T into steps, so γ increases for any parameters. The tables of the schedule are computed from the
parameters inside jit, in float32.

The bound determines the ends: a larger γ_1 raises the decoder's term, a smaller γ_T the prior's. For T → ∞ the bound
does not depend on γ between the ends (VDM, section 5.1); for a finite T it does.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from diffusion import process
from diffusion.gaussian import log1mexp
from diffusion.schedules import Row, Schedule

NAME = "learned"  # as schedule.name, next to the fixed ones of `schedules.SCHEDULES`
SUBTREE = "schedule"  # the name of the parameters, next to the modules of the network
# What trains the logits: the gradient of the bound, that of the losses' second moment, or nothing. Older runs call the
# second moment "variance".
Inner = Literal["bound", "second_moment", "fixed", "variance"]
# The part of γ_T − γ_1 that is divided evenly: no step vanishes, whatever the logits are.
EVEN_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Learned:
    """The settings of a learned schedule.

    Attributes:
        start: the schedule before training, by its name in `schedules.SCHEDULES`.
        inner: what trains γ between the ends; see `losses`.
        learning_rate: the learning rate of its few parameters, which are on the scale of log SNR.

    Raises:
        ValueError: the learning rate is outside (0, 10].
    """

    start: str = "linear"
    inner: Inner = "bound"
    learning_rate: float = 5e-3

    def __post_init__(self):
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"schedule.name: learning_rate={self.learning_rate} of learned must be in (0, 10]")
        if self.inner == "variance":
            object.__setattr__(self, "inner", "second_moment")


def init(start: Schedule) -> dict[str, Array]:
    """The parameters with which `schedule` is `start`.

    Raises:
        ValueError: `start` has fewer than two steps, ends without any signal (γ_T = ∞), or has a step shorter than a
            hundredth of the mean step.
    """
    if start.num_steps < 2:
        raise ValueError(
            f"a learned schedule divides the distance from γ_1 to γ_T, so schedule.num_steps={start.num_steps} "
            "must be at least 2"
        )
    if not jnp.isfinite(start.log_snr[1:]).all():
        raise ValueError(
            "a learned schedule cannot start where log SNR_T = −∞; choose another start (schedule.name)"
        )
    steps = jax.vmap(process.gamma_step)(start[2:])
    share = steps / steps.sum() - EVEN_SHARE / len(steps)
    if not (share > 0).all():
        raise ValueError(
            f"a learned schedule has no step below {EVEN_SHARE} of the mean, but its start has one (schedule.name)"
        )
    return {"gamma_1": -start.log_snr[1], "log_range": jnp.log(steps.sum()), "logits": jnp.log(share)}


def schedule(params: PyTree) -> Schedule:
    """The schedule of these parameters. It is differentiable, and γ_1 < … < γ_T for any parameters.

    `network_t` is t − 1, as in the fixed schedules. So before training every table equals that of the fixed schedule.
    The network also sees how noisy x_t is, so it can follow γ_t as it changes.
    """
    num_steps = params["logits"].size
    share = (1 - EVEN_SHARE) * jax.nn.softmax(params["logits"]) + EVEN_SHARE / num_steps
    return from_gamma(params["gamma_1"], jnp.exp(params["log_range"]) * share)


def of_params(params: PyTree) -> Schedule:
    """`schedule` of the parameters under SUBTREE."""
    return schedule(params[SUBTREE])


def from_gamma(gamma_1: Float[ArrayLike, ""], steps: Float[ArrayLike, " steps"]) -> Schedule:
    """The schedule with γ_1 and γ_t − γ_{t−1} = `steps`[t − 2] > 0, for t = 2…T.

    With Δ_t = γ_t − γ_{t−1}, Δ_1 = ∞ and σ the logistic function,

        ᾱ_t = σ(−γ_t),  1 − ᾱ_t = σ(γ_t),  α_t = ᾱ_t + (1 − ᾱ_t) e^{−Δ_t},
        β_t = (1 − ᾱ_t)(1 − e^{−Δ_t}),  β̃_t = (1 − ᾱ_{t−1})(1 − e^{−Δ_t}),
        μ̃_t = √ᾱ_{t−1} (1 − e^{−Δ_t}) x_0 + e^{−Δ_t}/√α_t x_t:

    Nearly equal numbers are never subtracted, so float32 is enough. (VDM, appendix A, has the same quantities in terms
    of γ.)
    """
    gamma = jnp.concatenate([jnp.array([-jnp.inf]), gamma_1 + jnp.pad(jnp.cumsum(steps), (1, 0))])
    step = jnp.concatenate([jnp.array([jnp.inf, jnp.inf]), steps])  # from clean data, the first step is infinite
    log_alpha_bar, log_one_minus_alpha_bar = -jax.nn.softplus(gamma), -jax.nn.softplus(-gamma)
    alpha_bar = jax.nn.sigmoid(-gamma)
    alpha_bar_prev = jnp.concatenate([jnp.ones(1), alpha_bar[:-1]])
    log_fraction = log1mexp(step)  # log(1 − e^{−Δ})
    log_beta = log_one_minus_alpha_bar + log_fraction
    beta = jnp.exp(log_beta)
    # log α is about −β for a small β, where the sum would round to 1.
    by_sum = jnp.logaddexp(log_alpha_bar, log_one_minus_alpha_bar - step)
    log_alpha = jnp.where(beta < 0.5, jnp.log1p(-jnp.minimum(beta, 0.5)), by_sum)
    log_beta_tilde = jnp.concatenate([jnp.full(1, -jnp.inf), log_one_minus_alpha_bar[:-1]]) + log_fraction
    beta_tilde = jnp.exp(log_beta_tilde)
    # As in `schedule_tables`: x_0 given x_1 is decoded with the width of t = 2.
    log_beta_tilde = log_beta_tilde.at[:2].set(log_beta_tilde[2])
    return Schedule(
        t=jnp.arange(len(gamma), dtype=jnp.int32),
        network_t=jnp.arange(len(gamma), dtype=jnp.float32) - 1.0,
        beta=beta,
        log_beta=log_beta,
        log_alpha=log_alpha,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        sqrt_alpha_bar=jnp.exp(0.5 * log_alpha_bar),
        sqrt_one_minus_alpha_bar=jnp.exp(0.5 * log_one_minus_alpha_bar),
        log_one_minus_alpha_bar=log_one_minus_alpha_bar,
        log_snr=-gamma,
        beta_tilde=beta_tilde,
        log_beta_tilde=log_beta_tilde,
        log_beta_large=log_beta.at[:2].set(log_beta_tilde[:2]),
        posterior_x0=jnp.sqrt(alpha_bar_prev) * jnp.exp(log_fraction),
        posterior_x_t=jnp.exp(-step - 0.5 * log_alpha),
    )


def with_fixed_inner(params: PyTree) -> PyTree:
    """The params with no gradient for the logits.

    γ_1 and γ_T depend on the logits by rounding alone, and Adam would enlarge that gradient.
    """
    own = params[SUBTREE]
    return params | {SUBTREE: own | {"logits": jax.lax.stop_gradient(own["logits"])}}


def losses(
    losses_of: Callable[[PyTree, Row], tuple[Float[Array, " b"], PyTree]],
    params: PyTree,
    rows_of: Callable[[PyTree], Row],
    inner: Inner,
) -> tuple[Float[Array, " b"], PyTree]:
    """losses_of(params, rows_of(params)), with the gradient that `inner` asks for.

    "bound": all gradients are those of the losses. "second_moment": the logits instead get the gradient of the squared
    KL terms, the losses of t > 1. For a large T the bound hardly depends on the logits. Then this gradient minimises
    the variance of these losses over t and ε, since E[L²] = Var L + (E L)². One backward pass serves both, because
    ∂L²/∂row = 2L ∂L/∂row for each example. Source: VDM, appendix I.2. "fixed": the logits get no gradient, so only the
    two ends are learned. Every entry of a row passes its gradient to γ, the network's input included, as in VDM.

    Args:
        losses_of: (params, rows with leaves [B]) -> the loss of each example, and further results without a gradient.
        params: the network's parameters, with the schedule's under SUBTREE.
        rows_of: the same params -> rows of `schedule` at some t, with leaves [B].
        inner: "bound", "second_moment" or "fixed".
    """
    if inner == "bound":
        return losses_of(params, rows_of(params))
    ends = rows_of(with_fixed_inner(params))
    if inner == "fixed":
        return losses_of(params, ends)
    own = params[SUBTREE]
    between = rows_of(params | {SUBTREE: jax.lax.stop_gradient(own) | {"logits": own["logits"]}})
    return _with_squared_gradient(losses_of)(params, ends, between)


def _with_squared_gradient(losses_of: Callable) -> Callable:
    """losses_of as a function of (params, row, the same row): to the latter goes the gradient of squared KL terms."""

    def forward(params, row, _):
        values, pull, further = jax.vjp(losses_of, params, row, has_aux=True)
        return (values, further), (pull, jnp.where(row.t > 1, 2 * values, 0.0))

    def backward(residuals, cotangents):
        pull, factor = residuals
        params_bar, row_bar = pull(cotangents[0])

        def scaled(leaf):  # the cotangent of an integer has no values
            return leaf if leaf.dtype == jax.dtypes.float0 else factor * leaf

        return params_bar, row_bar, jax.tree.map(scaled, row_bar)

    wrapped = jax.custom_vjp(lambda params, row, _: losses_of(params, row))
    wrapped.defvjp(forward, backward)
    return wrapped
