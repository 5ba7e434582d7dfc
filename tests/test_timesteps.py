"""The draw of t: every t equally often, or by its losses; and the memory of losses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import logit
from scipy.stats import norm

from diffusion import objectives, reverse, schedules, timesteps
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.runtime import devices, randomness
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.training import optimizer, parallel
from diffusion.training import schedule as trained_schedule
from diffusion.training.step import Examples, Training, initial_state, mean_loss, train_step

UNBIASED = [name for name in timesteps.SAMPLERS if name not in timesteps.LOSS_SHAPING]
T = 10
LOSSES = np.array([9.0, 0.0, 0.5, 3.0, 1.0, 1.0, 0.2, 0.01, 4.0, 2.0], np.float32)  # of t = 1…T
DRAWS = 200_000
FULL = timesteps.History(jnp.tile(jnp.asarray(LOSSES)[:, None], (1, 10)), jnp.full(T, 10, jnp.int32))


@partial(jax.jit, static_argnums=(2, 3, 4))
def loss_aware(history, key, batch_size=DRAWS, num_steps=T, uniform_share=0.001):
    sampler = timesteps.loss_aware(uniform_share=uniform_share)
    return sampler.draw(history, key, batch_size, num_steps)


@pytest.mark.parametrize("name", UNBIASED)
def test_before_any_loss_is_known_every_t_is_drawn_equally_often(name):
    sampler = timesteps.SAMPLERS[name]()
    memory = sampler.init(T)
    t, weight = jax.vmap(lambda key: sampler.draw(memory, key, 16, T))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(np.asarray(t).ravel(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    # 32,000 draws: a count's standard deviation is at most √(3200 · 0.9) = 54; allow 4.
    np.testing.assert_allclose(counts[1:], 3200, atol=4 * 54)
    np.testing.assert_array_equal(weight, np.ones((2000, 16), np.float32))


def test_low_discrepancy_fills_every_stratum_in_every_batch():
    for i in range(50):
        t, _ = timesteps.low_discrepancy().draw((), jax.random.key(i), 20, 100)
        gaps = np.diff(np.sort(t))
        assert gaps.max() <= 6 and gaps.min() >= 4  # 100/20 = 5 apart, up to rounding


def test_what_is_uniform_remembers_nothing():
    for name in ("uniform", "low_discrepancy"):
        sampler = timesteps.SAMPLERS[name]()
        assert jax.tree.leaves(sampler.update(sampler.init(T), jnp.ones(4, jnp.int32), jnp.ones(4))) == []


def test_loss_aware_draws_by_the_root_mean_square_loss():
    t, weight = loss_aware(FULL, jax.random.key(1))
    p = 0.999 * LOSSES / LOSSES.sum() + 0.001 / T
    counts = np.bincount(np.asarray(t), minlength=T + 1)[1:]
    assert (np.abs(counts - DRAWS * p) <= 4 * np.sqrt(DRAWS * p * (1 - p))).all()
    np.testing.assert_allclose(weight, 1 / (T * p[np.asarray(t) - 1]), rtol=1e-4)
    uneven = FULL._replace(losses=FULL.losses.at[4].set(jnp.arange(10.0)))
    _, uneven_weight = loss_aware(uneven, jax.random.key(1))
    rms = np.where(np.arange(T) == 4, np.sqrt(np.mean(np.arange(10.0) ** 2)), LOSSES)
    rarest = 1 / (0.999 * np.delete(rms, [1]).min() / rms.sum() + 0.0001) / T
    np.testing.assert_allclose(np.unique(uneven_weight)[-2:], [rarest, 1000], rtol=1e-3)


def test_the_weighted_loss_is_an_unbiased_estimate_of_the_uniform_mean():
    """Whatever the loss of today is: it need not be the one that is remembered."""
    today = jnp.asarray(np.random.RandomState(0).uniform(0.5, 2.0, T).astype(np.float32)) * (FULL.losses[:, 0] + 0.05)
    t, weight = loss_aware(FULL, jax.random.key(2))
    estimates = np.asarray(weight * today[t - 1], np.float64)
    stderr = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - today.mean()) < 4 * stderr
    uniform, _ = timesteps.uniform().draw((), jax.random.key(2), DRAWS, T)
    assert estimates.std() < 0.5 * np.asarray(today)[np.asarray(uniform) - 1].std()  # and that is why


def test_the_probabilities_are_exact_for_many_steps():
    """Σ_t p_t · 1/(T p_t) = 1 to the last ticket, and the rarest t keeps its share."""
    num_steps = 4000
    losses = jnp.concatenate([jnp.full(1, 1e4), jnp.zeros(num_steps - 1)])
    history = timesteps.History(jnp.tile(losses[:, None], (1, 10)), jnp.full(num_steps, 10, jnp.int32))
    t, weight = loss_aware(history, jax.random.key(0), 2_000_000, num_steps)
    rare = np.asarray(t) > 1
    np.testing.assert_allclose(np.asarray(weight)[rare], 1000.0, rtol=3e-3)  # 268 tickets, rounded to integers
    # 2,000 rare draws expected, each of weight 1000: their number has a standard deviation of √2000 = 45.
    np.testing.assert_allclose(rare.sum(), 2000, atol=4 * 45)


def test_the_draw_is_uniform_until_every_t_has_ten_losses():
    nearly = FULL._replace(counts=FULL.counts.at[3].set(9))
    _, weight = loss_aware(nearly, jax.random.key(0))
    np.testing.assert_array_equal(weight, 1.0)
    _, weight = loss_aware(FULL, jax.random.key(0))
    assert np.ptp(weight) > 0


@pytest.mark.parametrize("history_length", [10, 3])
def test_the_history_is_that_of_a_plain_loop(history_length):
    """Batches of 64 draws of 6 t's, so that some t's come more often in one batch than is remembered."""
    rng = np.random.RandomState(3)
    sampler = timesteps.loss_aware(history_length)
    history, plain = sampler.init(6), [[] for _ in range(6)]
    update = jax.jit(sampler.update)
    for step in range(8):
        t = rng.choice(6, size=64 if step % 2 else 5, p=[0.5, 0.2, 0.1, 0.1, 0.09, 0.01]).astype(np.int32) + 1
        losses = rng.exponential(size=len(t)).astype(np.float32)
        history = update(history, t, losses)
        for one_t, loss in zip(t, losses, strict=True):
            plain[one_t - 1] = plain[one_t - 1] + [loss]
        np.testing.assert_array_equal(history.counts, [len(all_losses) for all_losses in plain])
        for row, all_losses in zip(np.asarray(history.losses), plain, strict=True):
            last = all_losses[-history_length:]
            np.testing.assert_array_equal(np.sort(row), np.sort(last + [0.0] * (history_length - len(last))))
            for n in range(max(0, len(all_losses) - history_length), len(all_losses)):
                assert row[n % history_length] == all_losses[n]


def test_the_share_of_uniform_draws_is_what_is_asked_for():
    """t = 2 has no loss: only uniform draws find it, each with the weight 1/share."""
    t, weight = loss_aware(FULL, jax.random.key(1), DRAWS, T, 0.25)
    expected = DRAWS * 0.25 / T
    np.testing.assert_allclose((np.asarray(t) == 2).sum(), expected, atol=4 * expected**0.5)
    np.testing.assert_allclose(np.asarray(weight)[np.asarray(t) == 2], 4.0, rtol=1e-4)


def assert_frequencies(t, probability):
    counts = np.bincount(np.asarray(t), minlength=len(probability) + 1)[1:]
    assert (np.abs(counts - DRAWS * probability) <= 4 * np.sqrt(DRAWS * probability * (1 - probability)) + 1e-6).all()


@pytest.mark.parametrize("arguments", [{}, {"mean": 1.0, "std": 2.0}])
def test_log_normal_draws_the_nearest_step_of_ln_sigma(arguments):
    """Also where σ_T = ∞, as in the cosine schedule without its clip; both ends take what lies beyond them."""
    for schedule in (schedules.cosine(T), schedules.harmonic(T)):
        t, weight = timesteps.log_normal(schedule, **arguments).draw((), jax.random.key(3), DRAWS, T)
        mean, std = ({"mean": -1.2, "std": 1.2} | arguments).values()
        alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[1:]
        with np.errstate(divide="ignore"):
            log_sigma = 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))
        edges = np.concatenate([[-np.inf], 0.5 * (log_sigma[1:] + log_sigma[:-1]), [np.inf]])
        assert_frequencies(t, np.diff(norm.cdf(edges, mean, std)))
        np.testing.assert_array_equal(weight, 1)


@pytest.mark.parametrize("arguments", [{}, {"mean": -0.5, "std": 0.6}])
def test_logit_normal_draws_by_its_density(arguments):
    """Esser et al. (2024): 1/(s(1−s)) N(logit s; mean, std²), summed over ((t − 1)/T, t/T]."""
    t, weight = timesteps.logit_normal(**arguments).draw((), jax.random.key(4), DRAWS, T)
    mean, std = ({"mean": 0.0, "std": 1.0} | arguments).values()
    s = (np.arange(100 * T) + 0.5) / (100 * T)
    density = np.exp(-0.5 * ((logit(s) - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi) * s * (1 - s))
    assert_frequencies(t, density.reshape(T, 100).mean(axis=1) / T)
    np.testing.assert_array_equal(weight, 1)


def test_on_the_linear_path_both_are_one():
    """ln σ = logit s: what EDM draws for its σ is what Stable Diffusion 3 draws for its s."""
    flow = schedules.rectified_flow(500)
    keys = jax.random.split(jax.random.key(5))
    by_sigma, _ = timesteps.log_normal(flow, mean=0.3, std=0.8).draw((), keys[0], DRAWS, 500)
    by_s, _ = timesteps.logit_normal(mean=0.3, std=0.8).draw((), keys[1], DRAWS, 500)
    shares = [np.cumsum(np.bincount(np.asarray(t), minlength=501)) / DRAWS for t in (by_sigma, by_s)]
    # Half a step of a density of at most 2, and 4 standard deviations of two counts.
    assert np.abs(shares[0] - shares[1]).max() < 0.5 / 500 * 2 + 4 * (0.5 / DRAWS) ** 0.5


@pytest.mark.parametrize("name", timesteps.SAMPLERS)
def test_a_sampler_is_made_for_its_schedule(name):
    sampler = timesteps.make(timesteps.SAMPLERS[name], schedules.cosine(T), "every_term")
    t, _ = sampler.draw(sampler.init(T), jax.random.key(0), 64, T)
    assert t.dtype == jnp.int32 and 1 <= t.min() and t.max() <= T


@pytest.mark.parametrize("name", timesteps.LOSS_SHAPING)
def test_a_spread_of_nothing_is_refused_by_its_config_key(name):
    made = partial(timesteps.SAMPLERS[name], std=0.0)
    with pytest.raises(ValueError, match=f"objective.timesteps: std=0.0 of {name} must be above 0"):
        timesteps.make(made, schedules.cosine(T), "every_term")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"history_length": 0}, "history_length=0 of loss_aware must be at least 1"),
        ({"uniform_share": 0.0}, r"uniform_share=0.0 of loss_aware must be in \(0, 1\]"),
        ({"uniform_share": 1.5}, "uniform_share=1.5 of loss_aware"),
    ],
)
def test_an_argument_out_of_its_range_is_refused_by_its_config_key(arguments, words):
    with pytest.raises(ValueError, match=f"objective.timesteps: {words}"):
        timesteps.loss_aware(**arguments)


def test_a_share_at_1_of_almost_everything_is_refused():
    with pytest.raises(ValueError, match=r"objective.timesteps: low_discrepancy's at_1=1.0 must be in \[0, 0.9\]"):
        timesteps.low_discrepancy(at_1=1.0)


class Scale(nn.Module):
    """A network with one parameter."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        return self.param("scale", nn.initializers.constant(0.5), ()) * x


class Steps:
    """Train steps that draw t by its losses: on 8 devices, or on one in two microbatches."""

    def __init__(self):
        schedule, p = schedules.cosine(6), reverse.make("eps", "fixed_small")
        self.training = Training(
            network=Scale(),
            objective=objectives.make("simple", p, 6, num_levels=17),
            timesteps=timesteps.loss_aware(),
            schedule=trained_schedule.make(lambda params: schedule),
            optimizer=optimizer.make(optimizer.adam, optimizer.constant, 1e-2, num_steps=9),
            ema_decay=0.9,
            num_levels=17,
            batch_size=32,
            flip=False,
            log_every=1,
        )
        self.start = initial_state(self.training, {"scale": jnp.full((), 0.5)}, (4, 4, 1))
        self.images = np.random.RandomState(0).randint(0, 17, size=(64, 4, 4, 1)).astype(np.uint8)
        self.on_eight = parallel.train_steps(self.training, seed=0)
        microbatches = dataclasses.replace(self.training, grad_accum=2)
        one = partial(train_step, microbatches, axis_name="devices")
        self.on_one = jax.jit(jax.vmap(one, axis_size=1, axis_name="devices", in_axes=(None, None, 0)))

    def indices(self, step):
        return np.arange(32, dtype=np.int32) + 32 * (step % 2)

    def eight(self, steps, start=None):
        now, batch = devices.replicate(start or self.start), parallel.resident(Source("random", "train", self.images))
        for step in steps:
            now, metrics = self.on_eight(now, batch(self.indices(step)[None]))
        return now, metrics.host()

    def one(self, steps):
        now = self.start
        for step in steps:
            batched, metrics = self.on_one(jnp.int32(0), now, jnp.asarray(self.images[self.indices(step)])[None])
            now = jax.tree.map(lambda leaf: leaf[0], batched)
        return now, metrics


@pytest.fixture(scope="module")
def steps():
    return Steps()


def test_every_device_remembers_the_losses_of_the_whole_batch(steps):
    many, metrics = steps.eight(range(8))
    assert parallel.differing_replicas()(many) == []
    many = many.host()
    assert many.timesteps.counts.sum() == 8 * 32 and many.timesteps.counts.min() >= 10
    other, other_metrics = steps.one(range(8))
    np.testing.assert_array_equal(many.timesteps.counts, other.timesteps.counts)
    np.testing.assert_allclose(many.timesteps.losses, other.timesteps.losses, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(many.params["scale"], other.params["scale"], rtol=1e-4)


def test_the_step_learns_from_weighted_losses_and_remembers_unweighted_ones(steps):
    before, _ = steps.one(range(8))
    after, metrics = steps.one(range(9))
    own = randomness.of_step(jax.random.fold_in(randomness.stream(0, "train"), 8))
    t, weight = loss_aware(before.timesteps, own.t, 32, 6)
    keys = randomness.per_item(own.examples, jnp.arange(32))
    x0 = to_unit(jnp.asarray(steps.images[steps.indices(8)]), 17)
    _, (_, losses) = mean_loss(steps.training, before.params, Examples(x0, None, t, weight, keys))
    assert np.ptp(weight) > 0.1
    np.testing.assert_allclose(metrics["loss"], jnp.mean(weight * losses)[None], rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], metrics["loss"])
    for one, other in zip(timesteps.record(before.timesteps, t, losses), after.timesteps, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_resumed_run_draws_the_same_t(steps, tmp_path):
    """All of the state, history too, goes through a checkpoint, and the steps after it are bit-identical."""
    straight, _ = steps.eight(range(9))
    half, _ = steps.eight(range(7))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, half.host(), {})
        restored = checkpoints.restore(None, jax.eval_shape(lambda: steps.start))
    resumed, _ = steps.eight(range(7, 9), start=restored)
    jax.tree.map(np.testing.assert_array_equal, straight.host(), resumed.host())


@pytest.mark.parametrize("name", ["uniform", "low_discrepancy"])
def test_real_t_is_uniform_between_the_ends(name):
    sampler = timesteps.continuous(timesteps.SAMPLERS[name]())
    t, weight = jax.jit(sampler.draw, static_argnums=(2, 3))((), jax.random.key(0), 4000, 11)
    assert t.min() > 1 and t.max() < 11 and (weight == 1).all()
    expected = 1 + 10 * (np.arange(4000) + 0.5) / 4000
    atol = 0.01 if name == "low_discrepancy" else 0.4
    np.testing.assert_allclose(np.sort(t), expected, atol=atol)
    if name == "low_discrepancy":
        assert len(np.unique(t)) == 4000


@pytest.mark.parametrize("name", UNBIASED)
def test_kl_terms_are_all_but_the_decoder_s(name):
    sampler = timesteps.kl_terms(timesteps.SAMPLERS[name]())
    memory = sampler.init(6)
    t, weight = sampler.draw(memory, jax.random.key(0), 1000, 6)
    assert set(np.asarray(t).tolist()) == {2, 3, 4, 5, 6}
    np.testing.assert_allclose(weight, 1)
    memory = sampler.update(memory, t, t.astype(jnp.float32))
    if name == "loss_aware":
        np.testing.assert_array_equal(memory.losses, np.tile(np.arange(2.0, 7.0)[:, None], 10))


@pytest.mark.parametrize(("batch_size", "num_steps"), [(256, 1000), (8, 9), (64, 1000)])
def test_a_share_at_1_is_in_every_batch_and_the_mean_is_that_over_t(batch_size, num_steps):
    draw = timesteps.low_discrepancy(at_1=0.125).draw
    for seed in range(3):
        t, weight = map(np.asarray, draw((), jax.random.key(seed), batch_size, num_steps))
        assert (t == 1).sum() == batch_size // 8 and t.min() == 1 and 1 < t.max() <= num_steps
        assert (weight * (t == 1)).mean() == pytest.approx(1 / num_steps, rel=1e-6)
        assert weight.mean() == pytest.approx(1, rel=1e-6)
        # One t in each stratum: no mean of t is off by more than a stratum.
        assert (weight * t).mean() == pytest.approx((num_steps + 1) / 2, abs=num_steps / (batch_size * 7 / 8))


@pytest.mark.parametrize(("batch_size", "num_steps"), [(1000, 1000), (7, 1000)])
def test_no_share_is_set_aside_of_few_steps_or_few_examples(batch_size, num_steps):
    key, samplers = jax.random.key(0), [timesteps.low_discrepancy(at_1) for at_1 in (0.125, 0.0)]
    jax.tree.map(np.testing.assert_array_equal, *(one.draw((), key, batch_size, num_steps) for one in samplers))
