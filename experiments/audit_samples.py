"""Bounds that need samples or a solver, as rows of `experiments.audit`: importance weights, the ODE, the codec."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import likelihood, reverse, schedules
from diffusion.codec import Codec
from diffusion.model import Model
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule
from experiments import audit_quadrature, audit_spaces
from experiments.audit_bounds import Row, row_of
from experiments.audit_quadrature import FLOAT32_BITS, Bits
from experiments.audit_spaces import Moments, Space

STDERRS = 4  # a stated error is this many standard errors
WORD_BITS = 32
SOLVER_ERROR = 1e-3  # of a density by the ODE, relative


def importance(
    space: Space, network: str, moments: Moments, p: Reverse, schedule: Schedule, num_samples: int
) -> Iterator[Row]:
    """The importance-weighted bound for some K, and the mean of all weights, whose expectations sum to exactly 1.

    The bound's sum uses 2^−(mean over groups). By Jensen's inequality this sum is too large on average, so it does not
    hide a failure. The variance over groups is small, so the excess is negligible.
    """
    n = len(space.images)
    keys = jax.random.split(jax.random.key(1), n * num_samples).reshape(n, num_samples)
    log_weights = np.asarray(_log_weights(moments, schedule, space.images, keys, p, space.num_levels), np.float64)
    name = f"{p.variance}, {p.decoder}, {schedule.num_steps} steps"
    for k in (1, 8, 64):
        bits = -np.asarray(likelihood.importance_weighted_nats(jnp.asarray(log_weights, jnp.float32), k), np.float64)
        bits /= math.log(2)
        stderr = bits.std(axis=1, ddof=1) / bits.shape[1] ** 0.5
        found = row_of("bound", f"importance-weighted, K = {k}", space, network, name, Bits(bits.mean(axis=1), stderr))
        each = np.exp2(-bits.mean(axis=1)) * math.log(2) * stderr
        # Images are independent, so squared errors add.
        error = STDERRS * float(np.sqrt((each**2).sum())) + FLOAT32_BITS
        mean_error = STDERRS * float(np.sqrt(((space.probs * stderr) ** 2).sum())) + FLOAT32_BITS
        yield found._replace(error=error, mean_error=mean_error)
    weights = np.exp(log_weights)
    error = STDERRS * float(np.sqrt((weights.var(axis=1, ddof=1) / num_samples).sum())) + FLOAT32_BITS
    total = float(weights.mean(axis=1).sum())
    what = f"mean of {num_samples} weights"
    yield Row("bound", what, str(space), network, name, total, error, None, 0.0, space.entropy_bits, exactly=True)


@functools.partial(jax.jit, static_argnames=("p", "num_levels"))
def _log_weights(moments, schedule, images, keys, p, num_levels) -> Array:
    denoise = audit_spaces.denoiser(moments, p, schedule)

    def of_image(each: tuple[Array, Array]) -> Array:
        x0 = jnp.broadcast_to(each[0], (len(each[1]), *each[0].shape))
        return likelihood.log_weights_nats(denoise, p, schedule, x0, each[1], num_levels)

    return jax.lax.map(of_image, (images, keys))



def ode_schedule(num_levels: int) -> Schedule:
    """A schedule from noise of about half a bin, so that the density of exact data is nearly flat in each bin."""
    bin_width = 2 / (num_levels - 1)
    return schedules.linear_gamma(20, gamma_min=2 * math.log(0.45 * bin_width))


def dequantized(space: Space, network: str, moments: Moments) -> Iterator[Row]:
    """−log₂ of the density of dequantized data: the images' bits, and the density's integral over their bins.

    The integrals are by Gauss–Legendre in each bin. The mean over a bin of −log₂ p is at least −log₂ of the bin's
    probability (Jensen). The control leaves out the width of the bins, so it takes densities for probabilities.
    """
    most = 3 if space.num_pixels == 3 else 4

    def rule(count: int) -> tuple[np.ndarray, np.ndarray]:
        where, weight = np.polynomial.legendre.leggauss(count)
        # Points of zero weight, so that one program serves both rules.
        where, weight = np.pad(where, (0, most - count)), np.pad(weight, (0, most - count))
        grids = [np.stack(np.meshgrid(*[line] * space.num_pixels, indexing="ij"), -1) for line in (where, weight)]
        uniform = (grids[0].reshape(-1, 1, 1, space.num_pixels) + 1) / 2
        return uniform, (grids[1] / 2).prod(axis=-1).ravel()

    means, masses = [], []
    for count in (most, most - 1):
        uniform, weight = rule(count)
        found = _ode_bits(moments, space.images, jnp.asarray(uniform, jnp.float32), space.num_levels)
        found = np.asarray(found, np.float64)
        means.append(found @ weight)
        masses.append(float((np.exp2(-found) @ weight).sum()))
    error = np.abs(means[0] - means[1]) + SOLVER_ERROR
    of_images = Bits(means[0], error)
    name = "linear_gamma, 20 steps"
    yield row_of("bound", "ODE, dequantized", space, network, name, of_images)
    integral_error = abs(masses[0] - masses[1]) + SOLVER_ERROR
    what = "ODE, integral over the bins"
    yield Row("bound", what, str(space), network, name, masses[0], integral_error, None, 0.0, space.entropy_bits)
    width_bits = space.num_pixels * math.log2(2 / (space.num_levels - 1))
    forgotten = Bits(of_images.value + width_bits, error)
    yield row_of("control", "ODE, a density taken for a probability", space, network, name, forgotten)
    if space.num_pixels == 1:
        total, error = _integral(space, moments)
        what = "ODE, integral over all x"
        yield Row("bound", what, str(space), network, name, total, error, None, 0.0, space.entropy_bits, exactly=True)


@functools.partial(jax.jit, static_argnames="num_levels")
def _ode_bits(moments: Moments, x0: Array, uniform: Array, num_levels: int) -> Float[Array, "n points"]:
    from diffusion.exact import ode  # needs diffrax, the other parts do not

    with jax.ensure_compile_time_eval():
        schedule = ode_schedule(num_levels)
    p = reverse.make("x0", "fixed_small")
    predict = ode.eps_predictor(audit_spaces.instants(moments, schedule), p, schedule)

    def one(image: Array, where: Array) -> Array:
        return ode.dequantized_bpd(predict, schedule, image, where, num_levels) * image.size

    return jax.vmap(lambda image: jax.vmap(lambda where: one(image, where))(uniform))(x0)


def _integral(space: Space, moments: Moments) -> tuple[float, float]:
    """∫ p(x_0) dx_0 for one pixel, on two shifted grids that reach beyond all of the mass."""
    width, spacing, reach = 2 / (space.num_levels - 1), 0.01, 2.0
    sums = []
    for shift in (-0.25, 0.25):
        x = (np.arange(-reach, reach, spacing) + shift * spacing)[:, None, None, None]
        uniform = jnp.asarray(x / width + 0.5, jnp.float32)  # the position in the bin of the value 0, or beyond it
        bits = _ode_bits(moments, jnp.zeros((1, 1, 1, 1)), uniform, space.num_levels)
        sums.append(float(np.exp2(-np.asarray(bits, np.float64)).sum()) * spacing / width)
    return sum(sums) / 2, abs(sums[0] - sums[1]) / 2 + SOLVER_ERROR


def codec(space: Space, network: str, moments: Moments, decoder: str, copies: int, num_steps: int = 6) -> Row:
    """Encodes real files: one for each image, with `copies` copies of it, and one of the data.

    A file's bits are the bits of its words minus its initial random bits, which decoding returns. An image's length is
    its file's divided by the copies. If a code's lengths add up except for a constant c, Kraft's inequality for files
    says Σ 2^−length ≤ 2^(c/copies). The difference between two files with other random bits shows the error.
    """
    p, schedule = reverse.make("x0", "learned", decoder), schedules.cosine(num_steps)
    model = Model(audit_spaces.denoiser(moments, p, schedule), p, schedule, space.num_levels)
    coder = Codec(model, space.levels.shape[1:], copies, precision=4)

    def net_bits(images: np.ndarray, seed: int) -> float:
        message = coder.encode(images, seed)
        if seed == 0 and not np.array_equal(coder.decode(message, len(images)), images):
            raise ArithmeticError(f"the codec returned other images of {space}")
        return (len(message.words) - message.initial_words) * WORD_BITS

    lengths = np.asarray(
        [[net_bits(np.repeat(image[None], copies, axis=0), seed) for image in space.levels] for seed in (0, 1)]
    )
    lengths = lengths / copies
    bits = lengths.mean(axis=0)
    # The error from chance and from rounding to whole words: half the difference of two independent files.
    each = np.exp2(-bits) * math.log(2) * (lengths[0] - lengths[1]) / 2
    error = STDERRS * float(np.sqrt((each**2).sum()))
    drawn = np.random.RandomState(0).choice(len(bits), size=8 * copies, p=space.probs)
    counts = np.bincount(drawn, minlength=len(bits)) / len(drawn)
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())  # of the images that were drawn
    mean_bits = net_bits(space.levels[drawn], 0) / len(drawn)
    total, _ = audit_quadrature.mass(Bits(bits, bits))
    name = f"learned, {decoder}, cosine, {num_steps} steps"
    what = f"codec, {copies} copies"
    mean_error = 2 * WORD_BITS / len(drawn) + STDERRS / len(drawn) ** 0.5  # a path's length varies by less than a bit
    return Row("bound", what, str(space), network, name, total, error, mean_bits, mean_error, entropy)
