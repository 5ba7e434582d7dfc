"""Sampling from a given start, and with a function after every step: interpolation and inpainting."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import process, reverse, samplers, schedules


def drawn(**more):
    """Samples of a denoiser that knows nothing of the data."""
    s, p = schedules.cosine(6), reverse.make("eps", "fixed_small")
    keys = jax.random.split(jax.random.key(3), 3)
    return samplers.sample(samplers.ancestral(), lambda x_t, network_t: x_t / 2, p, s, keys, (4, 4, 1), **more)[0]


def test_a_given_start_is_where_it_starts_and_its_own_start_changes_nothing():
    keys = jax.random.split(jax.random.key(3), 3)
    own = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 1)))(keys)
    np.testing.assert_array_equal(drawn(x_T=own), drawn())
    assert (np.abs(drawn(x_T=own + 1.0) - drawn()).max(axis=(1, 2, 3)) > 0).all()


def test_what_is_done_after_a_step_sees_the_row_that_was_reached_and_its_result_goes_on():
    seen = []

    def note(row, x, keys):
        jax.debug.callback(lambda t, noise: seen.append((int(t), noise)), row.t, jax.random.normal(keys[0], (16,)))
        return x

    # The callback is a part of the loop's program, whose other operations XLA then fuses, and rounds, differently.
    np.testing.assert_allclose(drawn(after_step=note), drawn(), atol=1e-5)
    jax.effects_barrier()
    assert [t for t, _ in sorted(seen, key=lambda pair: -pair[0])] == [5, 4, 3, 2, 1, 0]
    numbers = np.array([noise for _, noise in seen])
    assert np.unique(numbers).size == numbers.size, "the keys differ from step to step"
    of_t = drawn(after_step=lambda row, x, keys: jnp.full_like(x, row.t))
    np.testing.assert_array_equal(of_t, np.zeros((3, 4, 4, 1)))


def test_known_pixels_are_kept_exactly_and_the_others_are_those_of_a_process_that_saw_them():
    """Of an image whose pixels are all equal, the known half determines the other half."""
    s, p = schedules.cosine(200), reverse.make("eps", "fixed_small")
    truth, known = jnp.full((4, 4, 1), 0.7), jnp.zeros((4, 4, 1), bool).at[:, :2].set(True)

    def denoise(x_t, network_t):
        """E[ε | x_t] where every pixel is the same number, drawn from N(0, 1)."""
        row = s[network_t.astype(int) + 1]
        a, v = (leaf[:, None, None, None] for leaf in (row.sqrt_alpha_bar, row.sqrt_one_minus_alpha_bar**2))
        x0_hat = a * x_t.sum(axis=(1, 2, 3), keepdims=True) / (16 * a**2 + v)
        return (x_t - a * x0_hat) / jnp.sqrt(v)

    def keep_known(row, x, keys):
        eps = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return jnp.where(known, process.q_sample(row, jnp.broadcast_to(truth, x.shape), eps), x)

    keys = jax.random.split(jax.random.key(3), 32)
    x0, _ = samplers.sample(
        samplers.ancestral(), denoise, p, s, keys, (4, 4, 1), clip_x0=False, after_step=keep_known
    )
    np.testing.assert_array_equal(x0[:, :, :2], np.broadcast_to(truth[:, :2], x0[:, :, :2].shape))
    free = x0[:, :, 2:].mean(axis=(1, 2, 3))
    assert np.abs(free.mean() - 0.7) < 0.1 and free.std() < 0.3  # without the known half: mean 0, deviation 1
