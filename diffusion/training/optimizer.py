"""The optimizer, from Optax: gradient clipping, then Adam or another rule, with warm-up and learning rate decay."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as muon_of_optax


def adam(learning_rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """Adam (Kingma & Ba 2015) with the settings of Ho et al. (2020), appendix B."""
    _check_betas(b1=b1, b2=b2)
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


def adamw(
    learning_rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): weight_decay × learning rate × parameter."""
    _check_betas(b1=b1, b2=b2)
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def muon(learning_rate: optax.Schedule, beta: float = 0.95):
    """Muon (Jordan 2024): makes the singular values of every kernel's momentum about equal; NAdam for vectors.

    A kernel of [..., in, out] is the matrix that maps the inputs in its window to its outputs. The elements of its step
    have a size of 0.2 of the learning rate, like Adam's in the long run (Liu et al. 2025, arXiv 2502.16982).
    """
    _check_betas(beta=beta)

    def kernels(params: PyTree) -> PyTree:
        def as_matrix(leaf: jax.Array) -> MuonDimensionNumbers | None:
            if leaf.ndim < 2:
                return None
            *window_and_in, out = range(leaf.ndim)
            return MuonDimensionNumbers(tuple(window_and_in), (out,))

        return jax.tree.map(as_matrix, params)

    return muon_of_optax(learning_rate, beta=beta, consistent_rms=0.2, muon_weight_dimension_numbers=kernels)


OPTIMIZERS = {"adam": adam, "adamw": adamw, "muon": muon}


def constant(peak: float, num_steps: int) -> optax.Schedule:
    """The peak learning rate for the whole training."""
    return optax.constant_schedule(peak)


def cosine(peak: float, num_steps: int, end: float = 0.0) -> optax.Schedule:
    """From the peak to `end` × peak along half a cosine, in `num_steps` steps."""
    return optax.cosine_decay_schedule(peak, max(1, num_steps), alpha=end)


DECAYS = {"constant": constant, "cosine": cosine}


def make(
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    decay: Callable[[float, int], optax.Schedule],
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer, after a clip of the gradient's global norm. Ho et al. (2020), appendix B.

    Args:
        optimizer: one of OPTIMIZERS, with its other arguments bound.
        decay: one of DECAYS, with its other arguments bound.
        learning_rate: the peak learning rate.
        num_steps: the length of training, for the decay.
        warmup_steps: the learning rate rises linearly from 0 over this many steps.
        grad_clip: the largest global norm of the gradient, before the optimizer sees it; 0 for no clip.
    """
    schedule = decay(learning_rate, num_steps - warmup_steps)
    if warmup_steps:
        ramp = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        schedule = optax.join_schedules([ramp, schedule], [warmup_steps])
    clip = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    return optax.chain(*clip, optimizer(schedule))


def _check_betas(**betas: float) -> None:
    for name, beta in betas.items():
        if not 0 <= beta < 1:
            raise ValueError(f"optim.name: {name}={beta} must be in [0, 1)")
