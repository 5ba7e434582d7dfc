"""Denoising diffusion on one page; the equation numbers are those of Ho, Jain & Abbeel (2020, arXiv 2006.11239).

    python examples/ddpm.py

Trains on the 8×8 digits of scikit-learn, prints the loss and the bits/dim of held-out images, and writes samples.png.
2.518 ± 0.020 bits/dim (95% interval over seeds 0 to 2, Student's t), of which σ_t² = β_t costs any network 1.002.
(A histogram per pixel: 2.439.) 5 to 10 minutes beside other work, 134 to 155 s of CPU time; 2 CPU cores, 2026-11-29.
The comment after a name gives the file of this repository that does it properly."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from jax.tree_util import Partial
from sklearn.datasets import load_digits


class Diffusion:
    def __init__(self, T, num_levels):  # diffusion/schedules.py
        beta = np.append(0, np.linspace(1e-4, 0.02, T) * 1000 / T)  # section 4, where T is 1000; beta[t] is β_t
        alpha_bar = np.cumprod(1 - beta)  # eq. 4; NumPy has float64, and float32 would spoil 1 − ᾱ_1
        beta_tilde = np.append(0, beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]))  # eq. 7
        beta_tilde[1] = beta_tilde[2]  # β̃_1 is 0, but the decoder needs a width: it takes β̃_2
        sigma2 = np.append(beta_tilde[:2], beta[2:])  # section 3.2: σ_t² = β_t, chosen as T was
        self.T, self.num_levels = T, num_levels
        self.beta, self.alpha_bar, self.one_minus_alpha_bar = map(jnp.float32, (beta, alpha_bar, 1 - alpha_bar))
        self.beta_tilde, self.sigma2 = jnp.float32(beta_tilde), jnp.float32(sigma2)

    def q_sample(self, x0, t, eps):  # diffusion/process.py. Here t is [B, 1, 1, 1], x0 and eps are [B, H, W, C]
        return jnp.sqrt(self.alpha_bar[t]) * x0 + jnp.sqrt(self.one_minus_alpha_bar[t]) * eps  # eq. 4

    def posterior_mean(self, x0, x_t, t):  # diffusion/process.py
        x0_part = jnp.sqrt(self.alpha_bar[t - 1]) * self.beta[t] * x0
        x_t_part = jnp.sqrt(1 - self.beta[t]) * self.one_minus_alpha_bar[t - 1] * x_t
        return (x0_part + x_t_part) / self.one_minus_alpha_bar[t]  # eq. 7

    def p_mean(self, denoise, x_t, t):  # diffusion/reverse.py
        x0_hat = (x_t - jnp.sqrt(self.one_minus_alpha_bar[t]) * denoise(x_t, t)) / jnp.sqrt(self.alpha_bar[t])  # eq. 15
        return self.posterior_mean(jnp.clip(x0_hat, -1, 1), x_t, t)  # eq. 11, where nothing is clipped

    def loss(self, denoise, x0, t, eps):  # diffusion/objectives.py
        return jnp.mean((eps - denoise(self.q_sample(x0, t, eps), t)) ** 2)  # eq. 14

    def train_step(self, network, optimizer, params, ema, opt_state, x0, t, eps):  # diffusion/training/step.py
        loss, grads = jax.value_and_grad(lambda p: self.loss(Partial(network.apply, p), x0, t, eps))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 0.01), opt_state, loss

    def sample(self, denoise, z):  # diffusion/samplers.py. z[T] is x_T; z[t] is the noise drawn for x_t
        def step(i, x_t):
            t = jnp.full((len(x_t), 1, 1, 1), self.T - i)
            return self.p_mean(denoise, x_t, t) + jnp.where(t > 1, jnp.sqrt(self.sigma2[t]) * z[self.T - i - 1], 0)

        return jax.lax.fori_loop(0, self.T, step, z[self.T])  # algorithm 2

    def bound(self, denoise, x0, eps):  # diffusion/likelihood.py: [L_0, …, L_T] of eq. 5 for each image, in bits/dim
        def kl(mean_1, var_1, mean_2, var_2):  # diffusion/gaussian.py
            return 0.5 * (var_1 / var_2 - 1 - jnp.log(var_1 / var_2) + (mean_1 - mean_2) ** 2 / var_2)

        def term(t_and_eps):
            t = jnp.full((len(x0), 1, 1, 1), t_and_eps[0])
            x_t = self.q_sample(x0, t, t_and_eps[1])
            mean, sigma2 = self.p_mean(denoise, x_t, t), self.sigma2[t]
            divergence = kl(self.posterior_mean(x0, x_t, t), self.beta_tilde[t], mean, sigma2)
            return jnp.where(t == 1, -self.decoder_log_prob(mean, sigma2, x0), divergence)

        L = jax.lax.map(term, (jnp.arange(1, self.T + 1), eps))
        L_T = kl(jnp.sqrt(self.alpha_bar[self.T]) * x0, self.one_minus_alpha_bar[self.T], 0, 1)
        return jnp.append(L, L_T[None], axis=0).mean(axis=(2, 3, 4)) / np.log(2)

    def decoder_log_prob(self, mean, sigma2, x0):  # diffusion/gaussian.py
        half = 1 / (self.num_levels - 1)  # of a pixel value's bin, eq. 13; the outermost bins are open
        low = jnp.where(x0 < half - 1, -jnp.inf, (x0 - half - mean) / jnp.sqrt(sigma2))
        high = jnp.where(x0 > 1 - half, jnp.inf, (x0 + half - mean) / jnp.sqrt(sigma2))
        far, near = jax.scipy.special.log_ndtr(jnp.where(low > 0, jnp.array([-high, -low]), jnp.array([low, high])))
        return near + jnp.log(-jnp.expm1(far - near))  # log(Φ(high) − Φ(low)), or of Φ(−low) − Φ(−high)


class UNet(nn.Module):  # diffusion/networks/unet.py, which has attention and dropout, too
    width: int = 32

    @nn.compact
    def __call__(self, x_t, t):
        def block(h, width):
            r = nn.Conv(width, (3, 3))(nn.swish(nn.GroupNorm(4)(h))) + nn.Dense(width)(embedding)[:, None, None]
            return nn.Dense(width)(h) + nn.Conv(width, (3, 3))(nn.swish(nn.GroupNorm(4)(r)))

        angles = t.reshape(-1, 1) * jnp.geomspace(1, 1e-4, self.width // 2)
        embedding = nn.swish(nn.Dense(4 * self.width)(jnp.append(jnp.sin(angles), jnp.cos(angles), axis=-1)))
        large = block(nn.Conv(self.width, (3, 3))(x_t), self.width)
        small = block(nn.avg_pool(large, (2, 2), (2, 2)), 2 * self.width)
        h = block(jnp.append(small.repeat(2, axis=1).repeat(2, axis=2), large, axis=-1), self.width)
        return nn.Conv(x_t.shape[-1], (3, 3))(nn.swish(nn.GroupNorm(4)(h)))


if __name__ == "__main__":  # diffusion/data/digits.py, diffusion/programs/train.py
    key, T, batch_size, num_steps = jax.random.key(0), 100, 64, 3000  # T was chosen on training images
    images = load_digits().images[..., None].astype(np.float32) / 8 - 1  # pixel values 0…16 in [-1, 1]
    train, test = (jnp.array(images[(np.arange(len(images)) % 6 == 5) == held_out]) for held_out in (False, True))
    diffusion, network = Diffusion(T, num_levels=17), UNet()
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    params = ema = network.init(key, train[:1], jnp.ones((1, 1, 1, 1)))
    opt_state, step = optimizer.init(params), jax.jit(Partial(diffusion.train_step, network, optimizer))
    for i in range(num_steps):  # algorithm 1
        x0_key, t_key, eps_key = jax.random.split(jax.random.fold_in(key, i), 3)
        x0 = jax.random.choice(x0_key, train, (batch_size,))
        t = jax.random.randint(t_key, (batch_size, 1, 1, 1), 1, T + 1)
        params, ema, opt_state, loss = step(params, ema, opt_state, x0, t, jax.random.normal(eps_key, x0.shape))
        if i % 100 == 99:
            print(f"step {i + 1}: loss {loss:.4f}", flush=True)
    denoise, (bound_key, sample_key) = Partial(network.apply, ema), jax.random.split(jax.random.fold_in(key, num_steps))
    L = jax.jit(diffusion.bound)(denoise, test, jax.random.normal(bound_key, (T, *test.shape)))
    for name, bpd in {"bound": sum(L), "L_0": L[0], "L_1 + … + L_{T−1}": sum(L[1:-1]), "L_T": L[-1]}.items():
        print(f"{name}: {bpd.mean():.4g} ± {bpd.std(ddof=1) / len(bpd) ** 0.5:.2g} bits/dim over {len(bpd)} images")
    x0 = jax.jit(diffusion.sample)(denoise, jax.random.normal(sample_key, (T + 1, 64, 8, 8, 1)))
    tiles = np.pad(x0[..., 0], [(0, 0), (1, 1), (1, 1)], constant_values=-1).reshape(8, 8, 10, 10)
    plt.imsave("samples.png", np.kron(tiles.transpose(0, 2, 1, 3).reshape(80, 80), np.ones((6, 6))), cmap="gray")
