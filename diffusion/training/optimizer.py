"""The optimizer, from Optax: gradient clipping, then Adam or another rule, with warm-up and learning rate decay."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonState

# The polynomial a x + b x³ + c x⁵ and the number of its iterations; Jordan (2024).
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def adam(learning_rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """Adam (Kingma & Ba 2015) with the settings of Ho et al. (2020), appendix B."""
    _check_betas(b1=b1, b2=b2)
    _check_eps(eps)
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


def adamw(
    learning_rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): weight_decay × learning rate × parameter."""
    _check_betas(b1=b1, b2=b2)
    _check_eps(eps)
    if weight_decay < 0:
        raise ValueError(f"optim.name: weight_decay={weight_decay} must be ≥ 0")
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def muon(learning_rate: optax.Schedule, beta: float = 0.95):
    """Muon (Jordan 2024): makes the singular values of every kernel's momentum about equal; NAdam for vectors.

    A kernel of [..., in, out] is the matrix that maps the inputs in its window to its outputs. The elements of its step
    have a size of 0.2 of the learning rate, like Adam's in the long run (Liu et al. 2025, arXiv 2502.16982). The state
    is that of `optax.contrib.muon`.
    """
    _check_betas(beta=beta)

    def kinds(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: "muon" if leaf.ndim >= 2 else "adam", params)

    of_kernels = optax.chain(
        _nesterov_momentum(beta),
        optax.stateless(lambda steps, _: jax.tree.map(orthogonal, steps)),
        optax.stateless(lambda steps, _: jax.tree.map(_as_large_as_adams, steps)),
        optax.scale_by_learning_rate(learning_rate),
    )
    of_vectors = optax.adamw(learning_rate, weight_decay=0.0, nesterov=True)
    return optax.partition({"muon": of_kernels, "adam": of_vectors}, kinds)


def _nesterov_momentum(beta: float) -> optax.GradientTransformation:
    """The momentum as it will be after one more step with this gradient, without the bias towards 0."""

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), jnp.asarray(NEWTON_SCHULZ))

    def update(grads: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(grads, state.mu, beta, 1)
        next_momentum = optax.tree.bias_correction(momentum, beta, optax.safe_increment(count))
        own = optax.tree.bias_correction(grads, beta, count)
        steps = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, next_momentum, own)
        return steps, state._replace(count=count, mu=momentum)

    return optax.GradientTransformation(init, update)


def _matrix_shape(kernel: Float[Array, "*window in out"]) -> tuple[int, int]:
    """(inputs in its window, outputs)."""
    return kernel.size // kernel.shape[-1], kernel.shape[-1]


def _as_large_as_adams(step: Float[Array, "*window in out"]) -> Float[Array, "*window in out"]:
    """A step whose elements have a root mean square of 0.2, from one whose singular values are 1."""
    return 0.2 * max(_matrix_shape(step)) ** 0.5 * step


def orthogonal(kernel: Float[Array, "*window in out"]) -> Float[Array, "*window in out"]:
    """Moves all singular values of a kernel to about 1 by Newton–Schulz iterations. Jordan (2024).

    An iteration is X ← X (a + b G + c G²) with G = Xᵀ X, or the same from the left for a wide matrix. It begins with
    the kernel divided by its norm, which is the root of G's trace. Here G and the product of the factors are iterated,
    and the kernel is multiplied once at the end. For a kernel of 3 × 3 × m × m these are 35 m³ multiplications instead
    of 95 m³.
    """
    a, b, c = NEWTON_SCHULZ
    matrix = kernel.reshape(_matrix_shape(kernel))
    is_wide = matrix.shape[0] < matrix.shape[1]

    def factor(gram: Array) -> Array:
        return a * jnp.eye(len(gram)) + b * gram + c * gram @ gram

    with jax.default_matmul_precision("highest"):  # G is not computed anew, so its rounding errors grow
        gram = jnp.einsum("mi,ni->mn", matrix, matrix) if is_wide else jnp.einsum("im,in->mn", matrix, matrix)
        scale = 1 / (jnp.sqrt(jnp.trace(gram)) + 1e-8)  # a kernel may be zero
        gram = scale**2 * gram
        product = last = factor(gram)
        for _ in range(ITERATIONS - 1):
            gram = last @ gram @ last
            last = factor(gram)
            product = last @ product
        product = scale * product
        return (product @ matrix if is_wide else matrix @ product).reshape(kernel.shape)


OPTIMIZERS = {"adam": adam, "adamw": adamw, "muon": muon}


def constant(peak: float, num_steps: int) -> optax.Schedule:
    """The peak learning rate for the whole training."""
    return optax.constant_schedule(peak)


def cosine(peak: float, num_steps: int, end: float = 0.0) -> optax.Schedule:
    """From the peak to `end` × peak along half a cosine, in `num_steps` steps; `end` is in [0, 1]."""
    if not 0 <= end <= 1:
        raise ValueError(f"optim.decay: end={end} must be in [0, 1]")
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
    clip = [optax.stateless(partial(_clipped, grad_clip))] if grad_clip else []
    return optax.chain(*clip, optimizer(schedule))


def _clipped(max_norm: float, grads: PyTree, _: PyTree) -> PyTree:
    """The gradient, made shorter if its norm is above the largest one.

    Optax divides each leaf by the norm. XLA does not repeat a division, so every leaf would be written and read again.
    """
    factor = jnp.minimum(1.0, max_norm / optax.global_norm(grads))
    return jax.tree.map(lambda leaf: factor * leaf, grads)


def _check_eps(eps: float) -> None:
    if not eps > 0:  # or a gradient of 0 would be divided by 0
        raise ValueError(f"optim.name: eps={eps} must be > 0")


def _check_betas(**betas: float) -> None:
    for name, beta in betas.items():
        if not 0 <= beta < 1:
            raise ValueError(f"optim.name: {name}={beta} must be in [0, 1)")
