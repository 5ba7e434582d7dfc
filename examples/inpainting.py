"""Inpainting with a known right answer: a Gaussian with correlated pixels, whose left half is given.

    python examples/inpainting.py

Given the left half, the right half is also Gaussian, with a mean and a covariance in closed form. The denoiser is
exact, so any difference from them is the method's own error. Putting the known pixels back after every step is not
enough, because the unknown ones were drawn without them. RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1)
goes back from t − 1 to t and repeats the step several times, so that both halves agree. Prints the exact moments and
those of the samples.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import process, reverse, samplers, schedules

SHAPE = (1, 8, 1)
COVARIANCE = 0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))  # 0.9 between neighbours
KNOWN = np.arange(8) < 4
GIVEN = np.where(KNOWN, [0.5, 0.8, 1.0, 1.2, 0, 0, 0, 0], 0.0)
SCHEDULE = schedules.cosine(100)
P = reverse.make("x0", "fixed_small")


def exact_posterior():
    """Mean and covariance of the unknown pixels given the known ones."""
    of_known, between = COVARIANCE[KNOWN][:, KNOWN], COVARIANCE[~KNOWN][:, KNOWN]
    gain = np.linalg.solve(of_known, between.T).T
    return gain @ GIVEN[KNOWN], COVARIANCE[~KNOWN][:, ~KNOWN] - gain @ between.T


def denoise(x_t, network_t):
    """E[x_0 | x_t] = √ᾱ Σ (ᾱ Σ + (1 − ᾱ) I)⁻¹ x_t."""
    values, vectors = (jnp.asarray(part, jnp.float32) for part in np.linalg.eigh(COVARIANCE))
    row = SCHEDULE[network_t.astype(int) + 1]
    a, v = row.sqrt_alpha_bar[:, None], row.sqrt_one_minus_alpha_bar[:, None] ** 2
    gain = a * values[None] / (a**2 * values[None] + v)
    return ((gain * (x_t.reshape(-1, 8) @ vectors)) @ vectors.T).reshape(x_t.shape)


def inpaint(denoise, p, schedule, x0, known, times, clip_x0=True):
    """The `after_step` of `samplers.sample` that draws the pixels of x0 [B, H, W, C] that are not known.

    Args:
        denoise, p, schedule, clip_x0: as for `sample`.
        known: bool [H, W, C].
        times: how many times each step is taken; 1 only puts the known pixels back.
    """

    def after_step(row, x, keys):
        def noise(number):
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:]))(keys)

        def put_back(x, number):
            return jnp.where(known[None], process.q_sample(row, x0, noise(number)), x)

        def again(i, x):
            above = schedule[row.t + 1]
            x_t = process.q_step(above, x).sample(noise(3 * i + 1))
            output = denoise(x_t, jnp.full(len(x), above.network_t))
            p_prev = jax.vmap(lambda x, out: p(above, x, out, clip_x0).p_prev)(x_t, output)
            return put_back(p_prev.sample(noise(3 * i + 2)), 3 * i + 3)

        return jax.lax.fori_loop(0, jnp.where(row.t > 0, times - 1, 0), again, put_back(x, 0))

    return after_step


@jax.jit
def drawn(keys, times):
    """A sample of all 8 pixels for each key."""
    x0 = jnp.broadcast_to(jnp.asarray(GIVEN, jnp.float32).reshape(1, *SHAPE), (len(keys), *SHAPE))
    hook = inpaint(denoise, P, SCHEDULE, x0, jnp.asarray(KNOWN).reshape(SHAPE), times, clip_x0=False)
    step = samplers.ancestral()
    x, _ = samplers.sample(step, denoise, P, SCHEDULE, keys, SHAPE, clip_x0=False, after_step=hook)
    return x.reshape(len(keys), 8)


def main(number=4000):
    mean, covariance = exact_posterior()
    print("exact          mean", mean.round(3), " standard deviation", np.sqrt(np.diag(covariance)).round(3))
    for times in (1, 2, 5, 10, 20):
        x = np.asarray(drawn(jax.random.split(jax.random.key(0), number), times))[:, ~KNOWN]
        print(f"{times:2} per step    mean", x.mean(axis=0).round(3), " standard deviation", x.std(axis=0).round(3))


if __name__ == "__main__":
    main()
