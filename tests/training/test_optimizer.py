"""The optimizer against Adam in NumPy: its arguments, the clip before it, and its learning rate over time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon

from diffusion.programs import describe
from diffusion.training import optimizer

RNG = np.random.default_rng(0)
START = RNG.normal(size=5)
# Of sizes that differ, because Adam forgets a size that is always the same.
GRADIENTS = RNG.normal(size=(6, 5)) * np.array([10.0, 0.1, 3.0, 0.01, 30.0, 1.0])[:, None]
RATE = 0.05


def numpy_adam(gradients, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """The parameters after each step. Kingma & Ba (2015), algorithm 1; Loshchilov & Hutter (2019), algorithm 2."""
    params, m, v, after = START.copy(), np.zeros(5), np.zeros(5), []
    for step, gradient in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        direction = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        params = params - RATE * (direction + weight_decay * params)
        after.append(params)
    return np.stack(after)


def clipped(gradients, norm):
    return [gradient * min(1.0, norm / np.linalg.norm(gradient)) for gradient in gradients]


def take_steps(made, gradients=GRADIENTS):
    params = jnp.asarray(START, jnp.float32)
    state, after = made.init(params), []
    for gradient in gradients:
        # As the train step does: Optax multiplies its integer counts with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = made.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return np.stack(after)


def make(rule=optimizer.adam, decay=optimizer.constant, num_steps=100, **settings):
    return optimizer.make(rule, decay, RATE, num_steps, **settings)


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (optimizer.adam, {}),
        (optimizer.adam, {"b1": 0.5}),
        (optimizer.adam, {"b2": 0.9}),
        (optimizer.adam, {"eps": 0.5}),
        (optimizer.adamw, {}),
        (optimizer.adamw, {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3}),
    ],
)
def test_every_argument_reaches_the_rule(rule, arguments):
    ours = take_steps(make(partial(rule, **arguments)))
    np.testing.assert_allclose(ours, numpy_adam(GRADIENTS, **arguments), rtol=1e-5, atol=1e-6)
    if arguments:  # so the line above says something
        assert np.abs(ours - numpy_adam(GRADIENTS)).max() > 1e-3


def test_a_gradient_is_clipped_before_adam_sees_it():
    """After it there would be no clip at all: Adam's step is as long as the learning rate, whatever the gradient."""
    ours = take_steps(make(grad_clip=1.0))
    np.testing.assert_allclose(ours, numpy_adam(clipped(GRADIENTS, 1.0)), rtol=1e-5, atol=1e-6)
    assert np.abs(ours - numpy_adam(GRADIENTS)).max() > 1e-2
    after = optax.chain(optimizer.adam(optax.constant_schedule(RATE)), optax.clip_by_global_norm(1.0))
    assert np.abs(ours - take_steps(after)).max() > 1e-2


def test_weight_decay_is_not_clipped():
    ours = take_steps(make(partial(optimizer.adamw, weight_decay=0.3), grad_clip=1.0))
    wanted = numpy_adam(clipped(GRADIENTS, 1.0), weight_decay=0.3)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def rates(num_taken, **settings):
    """The learning rate of each step: with plain gradient descent it is the step's length for a gradient of 1."""
    ones = np.ones((num_taken, 5))
    after = take_steps(make(optax.sgd, **settings), ones)
    return -np.diff(after[:, 0], prepend=np.float32(START[0]))


def test_the_rate_rises_linearly_from_0_and_then_stays():
    found = rates(8, warmup_steps=4)
    np.testing.assert_allclose(found, RATE * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1, 1]), atol=1e-6)


def test_without_a_warm_up_the_first_step_has_the_full_rate():
    np.testing.assert_allclose(rates(2), RATE, atol=1e-6)


@pytest.mark.parametrize("end", [0.0, 0.25])
def test_cosine_falls_from_the_peak_after_the_warm_up_to_its_end(end):
    """Half a cosine over the steps that are left; after them the rate stays at end × peak."""
    found = rates(16, decay=partial(optimizer.cosine, end=end), num_steps=12, warmup_steps=4)
    falling = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8))
    wanted = np.concatenate([np.arange(4) / 4, (1 - end) * falling + end, np.full(3, end)])
    np.testing.assert_allclose(found, RATE * wanted, atol=1e-6)


def test_a_training_that_is_all_warm_up_never_decays():
    found = rates(4, decay=optimizer.cosine, num_steps=4, warmup_steps=4)
    np.testing.assert_allclose(found, RATE * np.array([0, 0.25, 0.5, 0.75]), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_muon_makes_the_singular_values_of_a_kernels_step_about_equal(scale):
    """Of a gradient of any size; as large as Adam's step, whose elements are about the rate in size, is 0.2 of it."""
    kernel = RNG.normal(size=(3, 3, 4, 8))
    spread = np.linalg.svd(kernel.reshape(36, 8), compute_uv=False)
    step = first_step_of_muon(kernel * scale).reshape(36, 8)
    found = np.linalg.svd(step, compute_uv=False) / (RATE * 0.2 * 36**0.5)
    assert spread[0] / spread[-1] > 2
    # Five Newton-Schulz iterations end in about this band (Jordan 2024).
    assert 0.6 < found[-1] <= found[0] < 1.25
    np.testing.assert_allclose(np.sqrt(np.mean(step**2)), 0.2 * RATE, rtol=0.15)


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (16, 16), (16, 64), (3, 3, 4, 2)])
@pytest.mark.parametrize(("largest", "smallest"), [(1.0, 1.0), (1.0, 1e-6), (1e-9, 1e-9)])
def test_muon_is_optaxs(shape, largest, smallest):
    """Optax multiplies X in each iteration. Its state is the same, too, so either continues a run of the other.

    Both shorten the step of a momentum below 1e-8, and the singular values of its matrix with it.
    """
    u, _, v = np.linalg.svd(RNG.normal(size=(np.prod(shape[:-1]), shape[-1])), full_matrices=False)
    values = np.geomspace(largest, smallest, len(v))
    gradients = {"kernel": jnp.asarray((u * values @ v).reshape(shape), jnp.float32), "bias": jnp.ones(3)}
    dims = MuonDimensionNumbers(tuple(range(len(shape) - 1)), (len(shape) - 1,))
    rate, steps, states = optax.constant_schedule(RATE), {}, {}
    optaxs = muon(rate, consistent_rms=0.2, muon_weight_dimension_numbers={"kernel": dims, "bias": None})
    for name, rule in {"ours": optimizer.muon(rate), "optax": optaxs}.items():
        states[name] = rule.init(gradients)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(3):
                steps[name], states[name] = rule.update(gradients, states[name], gradients)
    assert jax.tree.structure(states["ours"]) == jax.tree.structure(states["optax"])
    jax.tree.map(np.testing.assert_array_equal, states["ours"], states["optax"])
    ours, theirs = (np.asarray(steps[name]["kernel"], np.float64) for name in ("ours", "optax"))
    # Float32 has 1e-7; the largest factor of a singular value, squared five times as that of G, is 3.44^10 = 2e5.
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    np.testing.assert_array_equal(steps["ours"]["bias"], steps["optax"]["bias"])


def test_muon_without_a_momentum_does_not_move():
    assert not first_step_of_muon(np.zeros((3, 3, 4, 8))).any()


def test_muon_leaves_vectors_to_adam():
    """Of two gradients that differ in size alone the first steps are equal."""
    vector = RNG.normal(size=8)
    steps = [first_step_of_muon(vector * scale) for scale in (1.0, 1e3)]
    np.testing.assert_allclose(*steps, rtol=1e-5)
    np.testing.assert_allclose(np.abs(steps[0]), np.abs(steps[0][0]), rtol=1e-5)


def test_the_flops_of_muon_are_those_of_its_products_of_matrices():
    """X Xᵀ, the product with X, and 17 products of 8 × 8 matrices, for a kernel that maps 36 inputs to 8 outputs."""
    products = 2 * (2 * 8 * 8 * 36 + 17 * 8**3)
    kernel, vector = jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    of_muon = describe.optimizer_flops(make(optimizer.muon), {"kernel": kernel, "bias": vector})
    assert products < of_muon < products + 25 * (3 * 3 * 4 * 8 + 8)  # and the momentum, norms and scales
    assert describe.optimizer_flops(make(optimizer.adam), {"kernel": kernel}) < 25 * 3 * 3 * 4 * 8


def first_step_of_muon(gradient):
    made = make(optimizer.muon)
    gradient = jnp.asarray(gradient, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(made.update(gradient, made.init(gradient), gradient)[0], np.float64)


ADAMS = {"adam": optimizer.adam, "adamw": optimizer.adamw}


@pytest.mark.parametrize("rule", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("arguments", [{"b1": 1.0}, {"b2": -0.1}, {"b2": 1.5}])
def test_a_beta_out_of_its_range_is_refused_by_its_config_key(rule, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"optim.name: {name}={value} must be in \[0, 1\)"):
        rule(optax.constant_schedule(RATE), **arguments)


@pytest.mark.parametrize(
    ("rule", "arguments", "words"),
    [
        (optimizer.adam, {"eps": 0.0}, "eps=0.0 must be > 0"),
        (optimizer.adamw, {"eps": -1.0}, "eps=-1.0 must be > 0"),
        (optimizer.adamw, {"weight_decay": -0.1}, "weight_decay=-0.1 must be ≥ 0"),
    ],
)
def test_an_update_that_divides_by_zero_or_grows_the_weights_is_refused(rule, arguments, words):
    with pytest.raises(ValueError, match=f"optim.name: {words}"):
        rule(optax.constant_schedule(RATE), **arguments)


@pytest.mark.parametrize("end", [-1.0, 1.5])
def test_a_learning_rate_that_ends_below_zero_or_above_its_peak_is_refused(end):
    with pytest.raises(ValueError, match=rf"optim.decay: end={end} must be in \[0, 1\]"):
        optimizer.cosine(RATE, 10, end=end)
