"""VDM's protocol against closed forms: a number of KL terms and their limit, no clip, pixel values by Bayes' rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import conditioning, likelihood, reverse, schedules
from diffusion.data.levels import to_unit
from diffusion.evaluation.bound import Settings, full_bound
from diffusion.evaluation.limit import for_protocol, limit, points
from diffusion.model import Model
from diffusion.runtime import devices, randomness

LOW, HIGH = -7.0, 5.0
KL_TERMS = 100
SETTINGS = Settings(seed=0, batch_size=2048, protocol="vdm2021", terms_per_image=17)


def model(**changes):
    """ε̂ = 0, on a curve of few knots; told of the noise, so that it has a bound for every T."""
    schedule = conditioning.on_gamma(schedules.linear_gamma(20, LOW, HIGH), LOW, HIGH)
    p = reverse.make(**{"prediction": "eps", "variance": "fixed_small"} | changes)
    return Model(lambda x_t, network_t: jnp.zeros_like(x_t), p, schedule, 17)


@pytest.fixture(scope="module", autouse=True)
def fewer_terms():
    """Than the protocol has."""
    with pytest.MonkeyPatch.context() as patch:
        shorter = likelihood.PROTOCOLS["vdm2021"]._replace(kl_terms=KL_TERMS)
        patch.setitem(likelihood.PROTOCOLS, "vdm2021", shorter)
        yield


@pytest.fixture(scope="module")
def scored(source, fewer_terms):
    """The bound of all images with T = 100, and the limit."""
    replicated, numbers = devices.replicate(for_protocol(model(), "vdm2021")), np.arange(len(source))
    finite = full_bound(SETTINGS)(replicated, source, numbers)
    return finite, limit(SETTINGS)(replicated, source, numbers, finite)


def test_a_network_that_predicts_nothing_has_the_bound_in_closed_form(scored):
    """E ε² = 1: T/2 expm1((γ_T − γ_1)/T) and ½ (γ_T − γ_1), eqs. 14 and 17 of Kingma et al. (2021)."""
    finite, at_limit = scored
    assert finite.terms_bpd.shape == (30, KL_TERMS + 1)
    exact = 0.5 * (HIGH - LOW) / np.log(2)
    step = (HIGH - LOW) / KL_TERMS
    np.testing.assert_allclose(finite.kl_bpd.mean(), exact * np.expm1(step) / step, rtol=0.03)
    assert 0 < at_limit.sampling_stderr < 0.05 * exact
    assert abs(at_limit.kl_bpd.mean() - exact) < 3 * at_limit.sampling_stderr
    for name in ("decoder_bpd", "prior_bpd", "decoded_mse"):
        np.testing.assert_array_equal(getattr(at_limit, name), getattr(finite, name))


def test_it_is_the_likelihood_s_unclipped_bound_with_the_decoder_by_bayes_rule(scored, source):
    scored_model = for_protocol(model(), "vdm2021")
    keys = jax.random.fold_in(randomness.stream(0, "eval"), source.split_number)
    keys = randomness.per_item(keys, jnp.arange(3))
    x0 = to_unit(jnp.asarray(source.images(np.arange(3))), 17)
    terms, x0_mse = likelihood.vlb_terms_bpd(
        scored_model.denoise, reverse.make("eps", "fixed_small", "bayes"), scored_model.schedule, x0, keys, 17, False
    )
    finite, _ = scored
    np.testing.assert_allclose(finite.decoder_bpd[:3], terms[:, 0], rtol=1e-5)
    np.testing.assert_allclose(finite.terms_bpd[:3, 1:], terms[:, 1:], rtol=5e-3)  # of two means' difference
    np.testing.assert_allclose(finite.x0_mse[:3], 64 * x0_mse, rtol=1e-4)


def test_a_schedule_of_its_own_length_is_kept_and_other_protocols_change_nothing():
    own = model()
    assert for_protocol(own, "nichol2021") is own
    scored = for_protocol(own, "vdm2021")
    assert (scored.schedule.num_steps, scored.p.decoder) == (KL_TERMS + 1, "bayes")
    np.testing.assert_allclose(scored.schedule.network_t[1:], np.linspace(0, 1000, KL_TERMS + 1), atol=1e-2)
    assert for_protocol(scored, "vdm2021").schedule is scored.schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance": "fixed_large"}, "bound for T → ∞, which the variance 'fixed_large' with the prediction 'eps'"),
        ({"variance": "learned"}, "bound for T → ∞, which the variance 'learned'"),
        ({"prediction": "mean"}, "bound for T → ∞, .* the prediction 'mean' does not"),
        ({"schedule": schedules.cosine(20)}, "of steps than the model's 20, .* not conditioned on γ"),
        ({"schedule": schedules.harmonic(20)}, "of steps than the model's 20, .* not conditioned on γ"),
    ],
    ids=str,
)
def test_a_model_without_the_limit_is_refused(changes, message):
    own = {"schedule": changes["schedule"]} if "schedule" in changes else {}
    given = dataclasses.replace(model(**{} if own else changes), **own)
    with pytest.raises(ValueError, match=f"the protocol 'vdm2021' scores .*{message}"):
        for_protocol(given, "vdm2021")


def test_the_limit_takes_as_many_instants_as_an_estimate_has_terms_beside_the_decoder_s():
    found = [points(dataclasses.replace(SETTINGS, terms_per_image=terms)) for terms in (0, 3, 9, 17)]
    assert found == [8, 1, 4, 8]


def test_two_decoders_are_refused():
    with pytest.raises(ValueError, match="the protocol 'ho2020' has a decoder of its own, and the model 'bayes'"):
        for_protocol(for_protocol(model(), "vdm2021"), "ho2020")
