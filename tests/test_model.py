"""A model is a pytree: an argument of compiled functions, with any parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from diffusion import likelihood, reverse, schedules
from diffusion.model import Model

SCHEDULE = schedules.cosine(6)
P = reverse.make("eps", "fixed_small")
X = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
T = jnp.asarray([0.0, 5.0])


def scaled(params, x_t, network_t):
    return params["scale"] * x_t + 0.1 * network_t[:, None, None, None]


def model(scale=0.5, p=P, schedule=SCHEDULE, num_levels=17):
    return Model(Partial(scaled, {"scale": jnp.float32(scale)}), p, schedule, num_levels)


def test_a_model_is_its_arrays_and_what_is_fixed_about_it():
    leaves, structure = jax.tree.flatten(model())
    assert len(leaves) == 1 + len(jax.tree.leaves(SCHEDULE))
    again = jax.tree.unflatten(structure, leaves)
    assert (again.p, again.num_levels) == (P, 17)
    np.testing.assert_array_equal(again.denoise(X, T), model().denoise(X, T))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model())
    assert doubled.denoise.args[0]["scale"] == 1.0 and doubled.schedule.t[-1] == 12


def test_jit_compiles_once_for_all_parameters_and_schedules():
    traced = []

    @jax.jit
    def terms(model, x0, keys):
        traced.append(None)
        measure = likelihood.term_and_x0_mse(model.p, model.num_levels)
        return likelihood.over_all_t(model.denoise, model.schedule, x0, keys, measure)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    results = [terms(made, X, keys) for made in (model(), model(0.7), model(schedule=schedules.linear(60)[:7]))]
    assert len(traced) == 1
    assert len({float(result.sum()) for result in results}) == 3
    alone, _ = likelihood.vlb_terms_bpd(model(0.7).denoise, P, SCHEDULE, X, keys, num_levels=17)
    np.testing.assert_allclose(results[1], alone, rtol=1e-5)
    # What is fixed about a model is part of the program.
    terms(model(num_levels=256), X, keys)
    terms(model(p=reverse.make("eps", "fixed_large")), X, keys)
    assert len(traced) == 3


def test_a_plain_function_is_wrapped_and_compiles_once_as_well():
    traced = []

    def half(x_t, network_t):
        return 0.5 * x_t

    @jax.jit
    def output(model):
        traced.append(None)
        return model.denoise(X, T)

    for _ in range(2):
        made = Model(half, P, SCHEDULE)
        assert isinstance(made.denoise, Partial) and made.num_levels == 256
        np.testing.assert_array_equal(output(made), 0.5 * X)
    assert len(traced) == 1


def test_a_method_of_an_object_is_wrapped_too():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, x_t, network_t):
            return self.factor * x_t

    made = jax.tree.map(jnp.asarray, Model(Scale(3.0), P, SCHEDULE))
    np.testing.assert_array_equal(made.denoise(X, T), 3.0 * X)


@pytest.mark.parametrize("transform", [jax.eval_shape, jax.make_jaxpr])
def test_shapes_may_take_the_place_of_arrays(transform):
    shapes = jax.eval_shape(model)
    assert isinstance(shapes, Model) and shapes.schedule.t.shape == (7,)
    transform(lambda model: model.denoise(X, T), shapes)


def test_gradients_reach_the_parameters_and_the_schedule():
    def total(model):
        return model.denoise(X, T).sum() + (model.schedule.log_snr[1:] ** 2).sum()

    gradient = jax.grad(total, allow_int=True)(model())
    np.testing.assert_allclose(gradient.denoise.args[0]["scale"], X.sum(), atol=1e-6)
    np.testing.assert_allclose(gradient.schedule.log_snr[1:], 2 * SCHEDULE.log_snr[1:], rtol=1e-6)
