"""Our full-size network against that of the diffusers package, if it is installed: pip install -e '.[peers]'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import interop, likelihood, process, reverse, schedules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def peer():
    """Ho et al.'s CIFAR-10 network as diffusers builds it, with random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_full_size_weights_give_the_same_output_posterior_and_bound(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    unet, params = interop.load_diffusers(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307

    schedule = schedules.linear(1000)
    t = np.array([2, 400, 1000])
    row = schedule[jnp.asarray(t)]
    generator = np.random.default_rng(0)
    x0 = (generator.integers(0, 256, (3, 32, 32, 3)) / 127.5 - 1).astype(np.float32)
    x_t = jax.vmap(process.q_sample)(row, x0, generator.standard_normal(x0.shape, np.float32))
    output = np.asarray(jax.jit(unet.apply)({"params": params}, x_t, row.network_t))
    with torch.no_grad():
        channels_first = torch.tensor(np.asarray(x_t).transpose(0, 3, 1, 2))
        wanted = peer(channels_first, torch.tensor(t - 1)).sample.numpy().transpose(0, 2, 3, 1)
    assert relative_error(output, wanted) < 1e-4

    # ε -> p(x_{t-1} | x_t) by the package's own sampling step, whose noise is silenced, and KL in float64 by hand.
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_small", clip_sample=True)
    p = reverse.make("eps", "fixed_small")
    ours, _ = jax.vmap(p)(row, x_t, output)
    terms = jax.vmap(lambda r, x0, x, out: likelihood.vlb_term_bpd(p, r, x0, x, out))(row, x0, x_t, output)
    means = [np.float64(scheduler_mean(scheduler, wanted[i], int(t[i]) - 1, np.asarray(x_t)[i])) for i in range(3)]
    assert relative_error(np.asarray(ours.mean), np.stack(means)) < 1e-4
    q = jax.vmap(process.q_posterior)(row, x0, x_t)
    variance = np.float64(row.beta_tilde)[:, None, None, None]
    kl_nats = (np.float64(q.mean) - np.stack(means)) ** 2 / (2 * variance)
    np.testing.assert_allclose(terms, kl_nats.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-4)


def scheduler_mean(scheduler, eps, network_t, x_t):
    """The mean from which diffusers draws x_{t-1}: the average of two draws with opposite noise."""
    draws = []
    for sign in (1, -1):
        noise = sign * torch.tensor(np.random.default_rng(1).standard_normal(eps.shape), dtype=torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            draws.append(scheduler.step(torch.tensor(eps), network_t, torch.tensor(x_t)).prev_sample.numpy())
    return (draws[0] + draws[1]) / 2
