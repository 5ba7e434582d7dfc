"""examples/ddpm.py imports nothing from the library and computes the same numbers.

Both get the same parameters and the same random numbers. They differ only in the order of float32 operations, each of
which rounds by 6e-8 of its result. Some ten of them stay below TOLERANCE; a wrong formula does not.
"""

import ast
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.tree_util import Partial

from diffusion import likelihood, objectives, reverse, samplers, schedules, timesteps
from diffusion.data.levels import to_unit
from diffusion.runtime import randomness
from diffusion.training import optimizer, step
from diffusion.training import schedule as training_schedule
from examples import ddpm

TOLERANCE = 1e-6  # of the largest number of an array
T, NUM_LEVELS, BATCH, SHAPE = 100, 17, 3, (4, 4, 1)
EXAMPLE = ddpm.Diffusion(T, NUM_LEVELS)
SCHEDULE, P = schedules.linear(T), reverse.make("eps", "fixed_large")
KEYS = jax.random.split(jax.random.key(1), BATCH)
X0 = to_unit(np.random.default_rng(1).integers(0, NUM_LEVELS, (BATCH, *SHAPE), np.uint8), NUM_LEVELS)


class Layer(nn.Module):
    """In the place of the U-Net, which takes longer to compile; one test has the U-Net itself."""

    @nn.compact
    def __call__(self, x_t, t):
        h = nn.Dense(4)(jnp.append(x_t, jnp.broadcast_to(t / T, x_t.shape), axis=-1))
        return nn.Dense(x_t.shape[-1])(nn.swish(h))


class OfTheLibrary(nn.Module):
    """A network of the example, called as the library calls one, whose network_t is t − 1."""

    network: nn.Module

    @nn.nowrap
    def apply(self, variables, x_t, network_t, dropout_keys=None):
        return self.network.apply(variables, x_t, network_t.reshape(-1, 1, 1, 1) + 1)


@pytest.fixture(autouse=True)
def plain_jax():
    """The example relies on the promotion that JAX has by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def parameters(network):
    """Of which none is 0: at zero, a bias could be left out and nobody would see."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.ones((1, 1, 1, 1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.1, leaf.shape)), shapes)


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
@partial(jax.vmap, in_axes=(None, 0))
def noise(number, key):
    """What the library draws from each image's key for each number."""
    return jax.random.normal(jax.random.fold_in(key, number), SHAPE)


def agree(example, library):
    for one, other in zip(jax.tree.leaves(example), jax.tree.leaves(library), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(other).max())


def library_step(network, params):
    """The library's state after its first train step with seed 0, the loss, and the t and ε that it drew."""
    training = step.Training(
        network=OfTheLibrary(network),
        objective=objectives.make("simple", P, T, NUM_LEVELS),
        timesteps=timesteps.uniform(),
        schedule=training_schedule.make(lambda params: SCHEDULE),
        optimizer=optimizer.make(optimizer.adam, optimizer.cosine, 2e-4, num_steps=10),
        ema_decay=0.99,
        num_levels=NUM_LEVELS,
        batch_size=BATCH,
        flip=False,
        log_every=1,
    )

    @partial(jax.vmap, axis_name="devices")
    def of_a_device(images):
        start = step.initial_state(training, params["params"], SHAPE)
        state, metrics = step.train_step(training, jnp.int32(0), start, images, "devices")
        keys = randomness.of_step(jax.random.fold_in(randomness.stream(0, "train"), 0)).examples
        own = randomness.of_example(randomness.per_item(keys, jnp.arange(BATCH)))
        eps = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(own.noise)
        return state, metrics["loss"], metrics["t"].reshape(-1, 1, 1, 1), eps

    images = np.uint8(np.round((X0 + 1) * 8))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], jax.jit(of_a_device)(images[None]))


def test_the_loss_and_an_optimizer_step():
    network = Layer()
    params = parameters(network)
    state, library_loss, t, eps = library_step(network, params)

    @jax.jit
    def example_step(t, eps):
        adam = optax.adam(optax.cosine_decay_schedule(2e-4, 10))
        return EXAMPLE.train_step(network, adam, params, params, adam.init(params), X0, t, eps)

    new, ema, opt_state, loss = example_step(t, eps)
    agree(loss, library_loss)
    agree(opt_state, state.opt_state)  # the gradient and its square
    agree((new, ema), (state.params, state.ema_params))


def test_its_samples():
    num_steps, network = 25, ddpm.UNet(width=8)  # few steps, because each passes the rounding of the one before on
    params = parameters(network)

    def library(keys):
        denoise, schedule = partial(OfTheLibrary(network).apply, params), schedules.linear(num_steps)
        return samplers.sample(samplers.ancestral(), denoise, P, schedule, keys, SHAPE)[0]

    z = noise(np.append(np.arange(num_steps), 0), KEYS)  # for the library x_T has the number 0
    example = ddpm.Diffusion(num_steps, NUM_LEVELS).sample
    agree(jax.jit(example)(Partial(network.apply, params), z), jax.jit(library)(KEYS))


def test_every_term_of_the_bound():
    network = Layer()
    params = parameters(network)

    def library(x0):
        denoise = partial(OfTheLibrary(network).apply, params)
        terms, _ = likelihood.vlb_terms_bpd(denoise, P, SCHEDULE, x0, KEYS, NUM_LEVELS)
        prior = jax.vmap(partial(likelihood.prior_bpd, SCHEDULE))(x0)
        return jnp.append(terms.T, prior[None], axis=0)

    eps = noise(np.arange(1, T + 1), KEYS)
    example, library = jax.jit(EXAMPLE.bound)(Partial(network.apply, params), X0, eps), jax.jit(library)(X0)
    agree(example, library)
    agree(np.asarray(example)[-1], np.asarray(library)[-1])  # the prior's term, which is small
    agree(np.sum(example, axis=0), np.sum(library, axis=0))


def test_it_is_one_page_without_the_library():
    page = Path(ddpm.__file__)
    source = page.read_text()
    assert len(source.splitlines()) <= 120
    files = re.findall(r"diffusion/[\w/.]+\.py", source)
    assert len(files) > 10 and all((page.parents[1] / file).exists() for file in files)
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"jax", "flax", "optax", "numpy", "sklearn", "matplotlib"}
