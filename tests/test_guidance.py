"""Labels and guidance: a network's outputs with and without a label, combined before any sampler sees them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import guidance, reverse, samplers, schedules
from diffusion.parameterizations import x0_per_output
from diffusion.reverse import Reverse

SHAPE = (4, 4, 1)
LABELS = np.array([2, 0, 1], np.int32)
SCHEDULE = schedules.cosine(10)


def network(x_t, network_t, labels):
    """A different answer for each label, t and half of the output; −1 is an answer of its own."""
    mean = jnp.cos(x_t) * (labels.astype(x_t.dtype)[:, None, None, None] + 2.0) + network_t[:, None, None, None]
    return jnp.concatenate([mean, 10.0 * mean], axis=-1)


@pytest.fixture
def batch():
    x_t = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    return x_t, jnp.full(3, 4.0)


def test_a_conditional_network_is_given_each_examples_label(batch):
    expected = network(*batch, jnp.asarray(LABELS))
    np.testing.assert_array_equal(guidance.conditional(network, LABELS)(*batch), expected)


def test_without_labels_every_example_has_none(batch):
    expected = network(*batch, jnp.full(3, guidance.NO_LABEL))
    np.testing.assert_array_equal(guidance.unconditional(network)(*batch), expected)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.7, 3.0])
def test_the_mean_is_extrapolated_and_the_variance_stays_conditional(batch, scale):
    given, without = network(*batch, jnp.asarray(LABELS)), network(*batch, jnp.full(3, -1))
    output = guidance.classifier_free(network, LABELS, scale)(*batch)
    expected = (1 + scale) * np.float64(given) - scale * np.float64(without)
    np.testing.assert_allclose(output[..., :1], expected[..., :1], rtol=1e-5)  # float32, numbers below 30
    np.testing.assert_array_equal(output[..., 1:], given[..., 1:])


def test_scale_minus_one_is_the_unconditional_mean(batch):
    output = guidance.classifier_free(network, LABELS, -1.0)(*batch)
    np.testing.assert_allclose(output[..., :1], guidance.unconditional(network)(*batch)[..., :1], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_guidance_of_every_prediction_is_guidance_of_eps(batch, prediction):
    """ε̂ of the combined outputs = the combination of both ε̂: the map from one to the other is affine."""
    x_t, _ = batch
    row = SCHEDULE[6]
    p = Reverse(prediction, "fixed_small")

    def eps_of(output):
        _, x0 = p(row, x_t[0], output, clip_x0=False)
        return (x_t[0] - row.sqrt_alpha_bar * x0) / row.sqrt_one_minus_alpha_bar

    def of_prediction(x_t, network_t, labels):
        return network(x_t, network_t, labels)[..., :1]

    times = jnp.full(3, row.network_t)
    guided = guidance.classifier_free(of_prediction, LABELS, 1.5)(x_t, times)[0]
    given = of_prediction(x_t, times, jnp.asarray(LABELS))[0]
    without = of_prediction(x_t, times, jnp.full(3, -1))[0]
    expected = 2.5 * eps_of(given) - 1.5 * eps_of(without)
    size = float(jnp.abs(expected).max() * abs(x0_per_output(p, row)))
    np.testing.assert_allclose(eps_of(guided), expected, atol=1e-4 * max(size, 1.0))


@pytest.mark.parametrize(("t", "is_guided"), [(3, False), (4, True), (7, True), (8, False)])
def test_an_interval_holds_its_upper_end_and_not_its_lower_one(batch, t, is_guided):
    x_t, network_t = batch[0], jnp.full(3, SCHEDULE[t].network_t)
    within = guidance.classifier_free(network, LABELS, 2.0, (3, 7))(x_t, network_t)
    expected = guidance.classifier_free(network, LABELS, 2.0 if is_guided else 0.0)(x_t, network_t)
    np.testing.assert_allclose(within, expected, rtol=1e-6)


@pytest.mark.parametrize("interval", [(2.5, 4.5), (2, 4), (2.9999999999, 4.9999999999), (-1e299, 2.1), (3.5, 1e299)])
def test_the_ends_of_an_interval_are_any_real_numbers(batch, interval):
    """Guided where low < t ≤ high, whatever float32 makes of the ends."""
    low, high = interval
    within, always = (guidance.classifier_free(network, LABELS, 2.0, ends) for ends in (interval, ()))
    guided = []
    for t in range(1, 11):
        times = jnp.full(3, SCHEDULE[t].network_t)
        if np.allclose(within(batch[0], times), always(batch[0], times), rtol=1e-6):
            guided.append(t)
    assert guided == [t for t in range(1, 11) if low < t <= high]


@pytest.mark.parametrize(("t", "is_guided"), [(2.3, False), (2.58, True), (4.02, True), (4.5, True), (4.51, False)])
def test_between_the_steps_an_interval_means_its_ends_as_they_are(batch, t, is_guided):
    """As on a grid with continuous=True."""
    within, always = (guidance.classifier_free(network, LABELS, 2.0, ends) for ends in ((2.5, 4.5), ()))
    times = jnp.full(3, t - 1)
    assert np.allclose(within(batch[0], times), always(batch[0], times), rtol=1e-6) == is_guided


def test_an_interval_means_the_steps_of_the_schedule_that_was_trained_with_also_after_respacing():
    """Respaced to t = 2, 5, 10: guided within (3, 7] is guided at the second of the three steps."""
    respaced = schedules.respace(SCHEDULE, np.array([2, 5, 10]))
    within = guidance.classifier_free(network, LABELS, 2.0, (3, 7))
    given = guidance.conditional(network, LABELS)
    x_t = jnp.ones((3, *SHAPE))
    differs = [
        not np.allclose(within(x_t, times), given(x_t, times))
        for times in (jnp.full(3, respaced[i].network_t) for i in (1, 2, 3))
    ]
    assert differs == [False, True, False]


def other(x_t, network_t, *labels):
    """A worse network: other numbers for the same arguments."""
    return jnp.sin(network(x_t, network_t, *(labels or (jnp.zeros(len(x_t), int),))))


@pytest.mark.parametrize("labels", [(), (jnp.asarray(LABELS),)])
def test_autoguidance_extrapolates_away_from_the_worse_network_and_keeps_the_variance(batch, labels):
    """Karras et al. (2024) write D_1 + (w − 1)(D_1 − D_0) with w = 1 + scale."""

    def best(x_t, network_t, *labels):
        return 2 * other(x_t, network_t, *labels) + 1

    output, worse = np.float64(best(*batch, *labels)), np.float64(other(*batch, *labels))
    found = guidance.autoguided(best, other, 0.8)(*batch, *labels)
    np.testing.assert_allclose(found[..., :1], (output + 0.8 * (output - worse))[..., :1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[..., 1:], best(*batch, *labels)[..., 1:])
    # t = 5 here, as network_t = 4.
    for interval, is_guided in (((4, 5), True), ((5, 9), False)):
        within = guidance.autoguided(best, other, 0.8, interval)(*batch, *labels)
        np.testing.assert_allclose(within, found if is_guided else best(*batch, *labels), rtol=1e-5)


def exact(schedule):
    """ε̂ for Gaussian data of variance 1/4, which knows the noise from network_t: as its schedule has it, or between."""
    tables = np.asarray(schedule.network_t)[1:], np.asarray(schedule.log_snr)[1:]

    def eps_hat(x_t, network_t):
        log_snr = jnp.interp(network_t, *map(jnp.asarray, tables))[:, None, None, None]
        noise = jax.nn.sigmoid(-log_snr)
        return jnp.sqrt(noise) * x_t / (noise + (1 - noise) / 4)

    return eps_hat


def test_a_guide_that_knows_the_same_at_each_noise_changes_nothing_whatever_its_schedule(batch):
    """(1 + w) ε − w ε = ε, if the guide is asked at the same log SNR."""
    own = schedules.from_gamma(np.linspace(-6, 4, 13), np.arange(13))
    its = schedules.from_gamma(np.linspace(-2, 2.5, 9) ** 3 / 2 - 3, 100 * np.arange(9))  # from −7 to 4.8
    x_t, told, guide = batch[0], jax.tree_util.Partial(exact(own)), jax.tree_util.Partial(exact(its))
    for t, scale in ((0.0, 3.0), (3.0, 0.5), (7.6, 3.0), (12.0, -1.0)):  # also between two steps
        guided = guidance.autoguided(told, guide, scale, (), guidance.clock(own, its))
        network_t = jnp.full(3, t)
        np.testing.assert_allclose(guided(x_t, network_t), told(x_t, network_t), rtol=1e-4, atol=1e-5)
    careless = guidance.autoguided(told, guide, 3.0)
    assert np.abs(careless(x_t, jnp.full(3, 7.0)) - told(x_t, jnp.full(3, 7.0))).max() > 0.1


def test_noise_that_the_guide_s_schedule_does_not_have_is_not_guided(batch):
    own = schedules.from_gamma(np.linspace(-6, 4, 11), np.arange(11))
    its = schedules.from_gamma(np.linspace(-3, 2, 6), np.arange(6))
    told = exact(own)
    guided = guidance.autoguided(told, lambda x_t, t: 0 * x_t, 1.0, (), guidance.clock(own, its))
    for t, factor in ((2, 1), (3, 2), (8, 2), (9, 1)):  # γ = t − 6
        network_t = jnp.full(3, float(t))
        np.testing.assert_allclose(guided(batch[0], network_t), factor * told(batch[0], network_t), rtol=1e-6)


def test_equal_noise_at_equal_t_needs_no_clock_and_a_step_without_signal_is_no_knot():
    assert guidance.clock(SCHEDULE, schedules.cosine(10)) is None
    assert guidance.clock(SCHEDULE, schedules.respace(SCHEDULE, [2, 7, 10])) is not None
    until_noise = schedules.harmonic(6)  # ᾱ_T = 0
    assert guidance.clock(until_noise, until_noise) is None
    asked, is_known = guidance.clock(SCHEDULE, until_noise)(SCHEDULE.network_t[1:])
    assert np.isfinite(asked).all() and asked.max() <= 4
    assert not guidance.clock(until_noise, SCHEDULE)(jnp.array([5.0]))[1]
    scaled = schedules.from_gamma(np.linspace(-6, 4, 11), np.arange(11), 255 / 256)
    with pytest.raises(ValueError, match="an x0_scale can neither guide nor be guided"):
        guidance.clock(SCHEDULE, scaled)


def test_a_guide_without_labels_ignores_them(batch):
    np.testing.assert_array_equal(guidance.blind(other)(*batch, jnp.asarray(LABELS)), other(*batch))


@pytest.mark.parametrize("interval", [(), (3, 7)])
def test_a_sampler_draws_from_a_guided_network_and_labels_of_another_batch_do_not_compile_again(interval):
    p = reverse.make("x0", "learned_range")
    keys = jax.random.split(jax.random.key(1), 3)
    traces = []

    @jax.jit
    def draw(labels):
        traces.append(None)
        denoise = guidance.classifier_free(network, labels, 0.5, interval)
        return samplers.sample(samplers.ancestral(), denoise, p, SCHEDULE, keys, SHAPE)[0]

    first, second = draw(jnp.asarray(LABELS)), draw(jnp.asarray(LABELS[::-1].copy()))
    assert len(traces) == 1
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first[2:1:-1, :, :, :].shape, second[:1].shape)


def test_a_guided_denoiser_is_an_argument_of_a_compiled_function_with_its_arrays_as_leaves():
    scaled = jax.tree_util.Partial(lambda w, x_t, network_t, labels: w * network(x_t, network_t, labels), jnp.ones(()))
    guided = guidance.classifier_free(scaled, LABELS, 0.5, (3, 7))
    leaves = jax.tree.leaves(guided)
    assert any(leaf is LABELS for leaf in leaves)
    assert sum(getattr(leaf, "shape", None) == () and isinstance(leaf, jax.Array) for leaf in leaves) == 2
