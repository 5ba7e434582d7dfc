"""The network's noise input: the tables against their formulas, and the functions that pass them on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import conditioning, continuous_time, learned_schedule, likelihood, reverse, samplers, schedules


def test_gamma_is_told_on_the_scale_of_1000_steps():
    schedule = conditioning.on_gamma(schedules.linear_gamma(101), -13.3, 5.0)
    np.testing.assert_allclose(schedule.network_t[1:], np.linspace(0, 1000, 101), atol=1e-2)
    np.testing.assert_allclose(
        schedules.respace(schedule, [1, 51, 101]).network_t, [-1, 0, 500, 1000], atol=1e-2
    )


def test_rescaling_t_of_1000_steps_changes_nothing():
    schedule = schedules.linear(1000)
    jax.tree.map(np.testing.assert_array_equal, conditioning.on_rescaled_t(schedule), schedule)


@pytest.mark.parametrize("num_steps", [4000, 3000, 50])
def test_rescaled_t_runs_to_1000_and_nothing_else_changes(num_steps):
    """improved-diffusion's t = 0…T − 1 is our t − 1, times the Python float 1000/T in float32."""
    schedule = schedules.cosine(num_steps)
    rescaled = conditioning.on_rescaled_t(schedule)
    theirs = np.arange(num_steps, dtype=np.float32) * np.float32(1000.0 / num_steps)
    np.testing.assert_array_equal(rescaled.network_t[1:], theirs)
    assert np.all(np.diff(rescaled.network_t) > 0)
    same = dataclasses.replace(rescaled, network_t=schedule.network_t)
    jax.tree.map(np.testing.assert_array_equal, same, schedule)


def test_a_respaced_process_is_told_the_numbers_of_the_one_that_was_trained():
    """As improved-diffusion's SpacedDiffusion: the original t, times 1000 over the original T."""
    rescaled = conditioning.on_rescaled_t(schedules.cosine(4000))
    np.testing.assert_array_equal(schedules.respace(rescaled, [1, 1001, 4000]).network_t[1:], [0, 250, 999.75])
    np.testing.assert_array_equal(schedules.evenly_spaced(rescaled, 2).network_t[1:], [0, 999.75])


def test_between_two_steps_and_in_a_finer_schedule_rescaled_t_is_interpolated():
    rescaled = conditioning.on_rescaled_t(schedules.cosine(20))
    instants = continuous_time.at(rescaled, jnp.float32([1.0, 2.5, 20.0]))
    np.testing.assert_allclose(instants.network_t, [0, 75, 950], rtol=1e-6)
    np.testing.assert_allclose(continuous_time.resampled(rescaled, 39).network_t[1:], np.arange(39) * 25, rtol=1e-6)


def test_the_rescaled_t_of_a_learned_schedule_stays_where_it_is():
    learned = learned_schedule.schedule(learned_schedule.init(schedules.cosine(50)))
    rescaled = jax.jit(conditioning.on_rescaled_t)(learned)
    np.testing.assert_allclose(rescaled.network_t[1:], np.arange(50) * 20, rtol=1e-6)


def test_samplers_and_the_bound_tell_the_network_the_same_rescaled_t():
    schedule, told = conditioning.on_rescaled_t(schedules.cosine(8)), {"sampler": set(), "bound": set()}

    def denoise(by):
        def output(x_t, network_t):
            jax.debug.callback(lambda t: told[by].update(t.tolist()), network_t)
            return x_t

        return output

    keys, p = jax.random.split(jax.random.key(0), 2), reverse.make("eps", "fixed_small")
    samplers.sample(samplers.ancestral(), denoise("sampler"), p, schedule, keys, (2, 2, 1))
    likelihood.vlb_terms_bpd(denoise("bound"), p, schedule, jnp.zeros((2, 2, 2, 1)), keys)
    jax.effects_barrier()
    assert told["sampler"] == told["bound"] == {125.0 * t for t in range(8)}
