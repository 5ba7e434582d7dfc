"""The optimizer, from Optax: gradient clipping, then Adam or another rule, with warm-up and learning rate decay."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as muon_of_optax

# The polynomial a x + b x³ + c x⁵ and the number of its iterations; Jordan (2024).
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


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

    # Without iterations, Optax's kernels have the direction of the momentum and the size of the step.
    of_momentum = muon_of_optax(
        learning_rate, beta=beta, ns_steps=0, consistent_rms=0.2, muon_weight_dimension_numbers=kernels
    )

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        steps, state = of_momentum.update(grads, state, params)
        return jax.tree.map(lambda step: step if step.ndim < 2 else _orthogonalized(step), steps), state

    return optax.GradientTransformation(of_momentum.init, update)


def _orthogonalized(step: Float[Array, "*window in out"]) -> Float[Array, "*window in out"]:
    """A kernel's step, as a matrix [*window · in, out], with singular values that are all about its norm."""
    matrix, norm = step.reshape(-1, step.shape[-1]), jnp.linalg.norm(step)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    matrix = orthogonal((matrix if is_wide else matrix.T) / (norm + 1e-12))  # a step may be zero
    return norm * (matrix if is_wide else matrix.T).reshape(step.shape)


def orthogonal(matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Moves all singular values to about 1 by Newton–Schulz iterations. Jordan (2024).

    An iteration is X ← (a + b G + c G²) X with G = X Xᵀ. Here G and the product of the factors are iterated and X is
    multiplied once at the end. For a kernel of 3 × 3 × m × m, where n = 9 m, these are 35 m³ multiplications instead
    of 95 m³.

    Args:
        matrix: a matrix of norm 1, m ≤ n.
    """
    a, b, c = NEWTON_SCHULZ

    def factor(gram: Array) -> Array:
        return a * jnp.eye(len(gram)) + b * gram + c * gram @ gram

    with jax.default_matmul_precision("highest"):  # G is not computed anew, so its rounding errors grow
        gram = matrix @ matrix.T
        product = last = factor(gram)
        for _ in range(ITERATIONS - 1):
            gram = last @ gram @ last
            last = factor(gram)
            product = last @ product
        return product @ matrix


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
