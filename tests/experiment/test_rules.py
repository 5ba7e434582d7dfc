"""Impossible combinations: a config breaks every rule, each rule names its keys and tests properties, not names."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10, digits
from diffusion import objectives, process, reverse, samplers, schedules
from diffusion.experiment import config as config_lib
from diffusion.experiment import rules, sampling


def changed(**keys):
    config = cifar10.get_config()
    with config.unlocked():
        config.eval.terms_per_image = 0  # its 9 are too many for the shortest schedules below
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    config_lib.check(config)
    return config


def combination(config):
    return rules.Combination(config, *rules.start_schedule(config), sampling.step(config))


def refusal(**keys):
    with pytest.raises(ValueError) as error:
        rules.check(changed(**keys))
    return str(error.value)


VDM = {"model__decoder": "bayes", "model__variance": "fixed_small"}
GUIDED = {"sample__guidance": 1.5, "model__conditional": True, "model__label_dropout": 0.1}
# For each rule a config that breaks it and no other.
BREAKING = (
    {"model__variance": "learned"},
    {"objective__name": "hybrid(vlb_weight=0.01)"},
    {"objective__name": "npr"},
    {"objective__name": "vlb", "objective__weighting": "p2(gamma=0.5)"},
    {"objective__name": "vlb", "objective__timesteps": "logit_normal(mean=0.5)"},
    {"schedule__name": "harmonic"},
    {"schedule__name": "learned(start='cosine')"},
    {
        "schedule__name": "learned(inner='second_moment')",
        "objective__name": "vlb",
        "objective__timesteps": "loss_aware(history_length=5)",
    },
    {"schedule__name": "learned(start='linear_gamma')", "objective__name": "vdm_continuous"} | VDM,
    {"objective__timesteps": "loss_aware(history_length=5)", "objective__name": "vdm_continuous"} | VDM,
    {"objective__timesteps": "low_discrepancy(at_1=0.125)", "objective__name": "vdm"} | VDM,
    {"objective__name": "vdm", "model__variance": "fixed_small"},
    {"objective__name": "vdm", "model__decoder": "bayes"},
    {"objective__name": "vdm_continuous", "model__prediction": "mean"} | VDM,
    {"schedule__name": "harmonic", "model__prediction": "x0", "model__conditioning": "gamma"},
    {"objective__name": "vdm", "schedule__num_steps": 1, "schedule__name": "cosine"} | VDM,
    {"eval__protocol": "ho2020", "model__decoder": "bayes"},
    {"eval__protocol": "vdm2021", "model__variance": "fixed_small"},
    {"eval__protocol": "vdm2021", "model__conditioning": "gamma"},
    {
        "sample__guidance_interval": (10, 500),
        "model__conditioning": "gamma",
        "sample__guidance": 1.5,
        "model__conditional": True,
        "model__label_dropout": 0.1,
    },
    {"model__rescale_t": True, "model__conditioning": "gamma"},
    {
        "sample__guidance_interval": (10, 500),
        "model__rescale_t": True,
        "sample__guidance": 1.5,
        "model__conditional": True,
        "model__label_dropout": 0.1,
    },
    {"eval__terms_per_image": 11, "schedule__num_steps": 11, "model__prediction": "x0", "schedule__name": "cosine"},
    {"sample__method": "heun", "sample__variance": "optimal"},
    {"model__label_dropout": 0.1},
    {"sample__labels": (3, 5)},
    {"sample__guidance": 1.5, "model__conditional": True},
    {"sample__guide": "runs/worse"},
    {"sample__guidance_interval": (10, 500)},
    {"sample__guidance_interval": (1000, 2000)} | GUIDED,
    {"ema__length": 0.07},
    {"quality__reference": "validation"},
    {"train__patience": 2},
    {"sample__num_steps": 1001},
    {"sample__grid": "log_snr(continuous=True)", "sample__num_steps": 9},
    {
        "sample__grid": "karras(continuous=True)",
        "sample__num_steps": 9,
        "model__conditioning": "gamma",
        "sample__variance": "optimal",
    },
    {"model__prediction": "mean", "sample__num_steps": 999},
    {"model__variance": "learned", "objective__name": "vlb", "sample__num_steps": 999},
    {"model__decoder": "bayes", "sample__num_steps": 1},
)


@pytest.mark.parametrize(("rule", "keys"), zip(rules.RULES, BREAKING, strict=True), ids=range(len(BREAKING)))
def test_every_rule_is_broken_by_some_config_and_its_message_names_keys_and_values(rule, keys):
    config = changed(**keys)
    broken = [other for other in rules.RULES if other.is_broken(combination(config))]
    assert broken == [rule]
    message = refusal(**keys)
    assert "\n" not in message
    named = re.findall(r"\{c\.([\w.]+)", rule.message)
    assert named
    flat = config_lib.flatten(config)
    for key in named:
        assert re.search(rf"{re.escape(key)}=({re.escape(repr(flat[key]))}|{re.escape(str(flat[key]))})", message), key
    assert {key.replace("__", ".") for key in keys} & set(named)


@pytest.mark.parametrize("get_config", [cifar10.get_config, digits.get_config])
def test_the_configs_break_no_rule(get_config):
    config = get_config()
    rules.check(config)
    assert not [rule for rule in rules.RULES if rule.is_broken(combination(config))]


def test_an_interval_of_guidance_contains_a_step_that_the_sampler_visits():
    assert "contains no t of the sampler's" in refusal(**GUIDED, sample__guidance_interval=(2.2, 2.8))
    keys = GUIDED | {"sample__guidance_interval": (300, 330)}
    assert "contains no t of the sampler's" in refusal(**keys, sample__num_steps=10)  # 1, 112, 223, 334, …
    for more in ({}, {"sample__num_steps": 11}, {"sample__num_steps": 10, "sample__method": "heun(s_churn=40)"}):
        rules.check(changed(**keys, **more))


# --- what counts is ᾱ_T, not the schedule's name

WITHOUT_SIGNAL = [("harmonic", 1000), ("harmonic", 7), ("linear", 20), ("quadratic", 20)]


@pytest.mark.parametrize(("name", "num_steps"), WITHOUT_SIGNAL)
def test_eps_is_refused_where_nothing_of_x0_is_left(name, num_steps):
    keys = {"schedule__name": name, "schedule__num_steps": num_steps}
    message = refusal(**keys)
    assert f"schedule.name='{name}' with schedule.num_steps={num_steps} ends with ᾱ_T = 0" in message
    for prediction in ("x0", "v", "mean"):
        rules.check(changed(**keys, model__prediction=prediction))


def test_the_mean_is_refused_too_where_the_step_before_has_no_signal_either():
    """β = 1 in every step: μ̃_T does not depend on x_0."""
    keys = {"schedule__name": "constant", "schedule__num_steps": 20}
    for prediction in ("eps", "mean"):
        assert f"model.prediction='{prediction}'" in refusal(**keys, model__prediction=prediction)
    for prediction in ("x0", "v"):
        rules.check(changed(**keys, model__prediction=prediction))


@pytest.mark.parametrize(("num_steps", "is_bounded"), [(20, False), (21, True)])
def test_the_loss_of_eps_is_bounded_exactly_where_it_is_allowed(num_steps, is_bounded):
    """For t > 1 it is T · ½ (SNR_{t−1}/SNR_t − 1) (ε − ε̂)² in nats: Kingma et al. (2021), section 4."""
    s, p = schedules.linear(num_steps), reverse.make("eps", "fixed_small")
    x0, eps = (jax.random.uniform(jax.random.key(i), (4, 4, 1), minval=-1.0) for i in range(2))
    vlb = objectives.make("vlb", p, num_steps)

    def loss(row):
        return vlb(row, x0, process.q_sample(row, x0, eps), eps, jnp.zeros_like(eps))[0]

    losses = jax.vmap(loss)(s[2:])
    assert np.isfinite(losses[:-1]).all() and bool(np.isfinite(losses[-1])) == is_bounded
    if is_bounded:
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps)
        snr = alpha_bar / (1 - alpha_bar)
        weight = num_steps * 0.5 * (snr[:-1] / snr[1:] - 1) / np.log(2)
        np.testing.assert_allclose(losses, weight * np.mean(np.float64(eps) ** 2), rtol=1e-3)
        rules.check(changed(schedule__num_steps=num_steps))


# --- the schedule that a config means


def test_arguments_of_a_sampler_reach_its_step():
    assert sampling.step(changed(sample__method="ddim(eta=1)")) == samplers.ddim(eta=1.0)


def test_an_argument_that_a_sampler_refuses_is_refused_by_key():
    assert refusal(sample__method="ddim(eta=1.5)") == "sample.method='ddim(eta=1.5)': eta must be in [0, 1], not 1.5"


def test_the_mean_of_a_step_is_the_mean_of_no_longer_step():
    """A network that is perfect in T steps: respaced, its output stands for another x_0, unless it predicts ε."""
    full = schedules.linear(50)
    short = schedules.evenly_spaced(full, 5)
    x0, eps = (jax.random.uniform(jax.random.key(i), (2, 2, 1), minval=-1.0) for i in range(2))
    t = 3
    row, respaced = full[int(short.network_t[t]) + 1], short[t]
    x_t = process.q_sample(row, x0, eps)
    error = {}
    for prediction in ("eps", "mean"):
        p = reverse.make(prediction, "fixed_small")
        output = p.target(row, x0, x_t, eps)
        error[prediction] = float(jnp.abs(p(respaced, x_t, output, clip_x0=False).x0_hat - x0).max())
    assert error["eps"] < 1e-3 and error["mean"] > 0.3
    assert "is the mean for the steps of that schedule only" in refusal(
        model__prediction="mean()", sample__num_steps=999
    )
    rules.check(changed(model__prediction="mean", sample__num_steps=1000))
    rules.check(changed(model__prediction="mean", sample__num_steps=0))


@pytest.mark.parametrize(
    "keys",
    [
        {"sample__num_steps": 0},
        {"sample__num_steps": 9, "sample__variance": "fixed_small"},
        {"sample__num_steps": 9, "sample__method": "ddim"},
    ],
)
def test_a_learned_variance_of_one_step_is_only_refused_where_a_sampler_takes_it_for_several(keys):
    """On the schedule of training, with another variance, or where the method does not ask for the variance."""
    learned = {"model__variance": "learned", "objective__name": "vlb"}
    rules.check(changed(**learned, **keys))
    words = "model.variance='learned' is the variance of the steps of that schedule only"
    assert words in refusal(**learned, sample__num_steps=9)


def test_a_learned_variance_is_refused_between_the_steps_too_even_with_as_many_steps():
    """At equal numbers of steps a continuous grid still has other noise levels, so each step has another length."""
    between = {"sample__grid": "karras(continuous=True)", "sample__num_steps": 1000, "model__conditioning": "gamma"}
    learned = {"model__variance": "learned", "objective__name": "vlb"}
    assert "is the variance of the steps of that schedule only" in refusal(**learned, **between)
    rules.check(changed(**learned, **between, sample__variance="fixed_small"))
    rules.check(changed(**learned, **between, sample__method="ddim"))
    rules.check(changed(**learned | {"model__variance": "learned_range"}, **between))


def test_a_grid_that_cannot_be_is_refused_by_key():
    message = refusal(sample__grid="karras(rho=0.5)", sample__num_steps=9)
    assert message == "sample.grid='karras(rho=0.5)': rho must be at least 1, not 0.5"
    assert "sample.grid='log_snr': cannot keep 0 of 1000 steps" in refusal(sample__grid="log_snr")
    without_end = {"schedule__name": "harmonic", "model__prediction": "x0", "sample__num_steps": 9}
    assert "sample.grid='log_snr': a grid of log SNR needs an end" in refusal(sample__grid="log_snr", **without_end)
    rules.check(changed(sample__grid="even", **without_end))


def test_between_the_steps_lies_a_grid_of_a_network_that_learned_so():
    between = {"sample__grid": "karras(rho=5, continuous=True)", "sample__num_steps": 9}
    rules.check(changed(**between, model__conditioning="gamma"))
    assert combination(changed(**between, objective__name="vdm_continuous", **VDM)).knows_between
    assert "model.prediction='mean' is not trained" in refusal(
        **between, model__conditioning="gamma", model__prediction="mean"
    )


def test_arguments_of_a_prediction_reach_it():
    assert combination(changed(model__prediction="edm(sigma_data=0.7)")).p.arguments == (("sigma_data", 0.7),)
    assert "sigma_data=-1.0 of edm" in refusal(model__prediction="edm(sigma_data=-1)")


def test_arguments_of_a_schedule_reach_it():
    schedule, learned = rules.start_schedule(changed(schedule__name="linear(beta_end=0.03)"))
    assert learned is None
    np.testing.assert_array_equal(schedule.beta, schedules.linear(1000, beta_end=0.03).beta)


def test_a_learned_schedule_starts_from_a_name_with_arguments():
    text = "learned(start='warmup(fraction=0.5)', inner='second_moment', learning_rate=1)"
    schedule, learned = rules.start_schedule(changed(schedule__name=text))
    np.testing.assert_array_equal(schedule.beta, schedules.warmup(1000, fraction=0.5).beta)
    assert (learned.inner, learned.learning_rate) == ("second_moment", 1.0)


@pytest.mark.parametrize("start", ["linaer", "learned", "linear(beta=3)", "linear(beta_end=f())", "cosine(offset='x')"])
def test_a_start_that_is_no_fixed_schedule_is_refused_by_key(start):
    text = f'learned(start="{start}")'
    message = refusal(schedule__name=text)
    assert message.startswith(f"schedule.name={text!r}: start ") and "\n" not in message


def test_every_pair_of_prediction_and_variance_has_an_objective():
    for prediction, variance in itertools.product(("eps", "x0", "v", "mean"), ("fixed_small", "learned_range")):
        rules.check(changed(model__prediction=prediction, model__variance=variance, objective__name="vlb"))


def test_every_prediction_has_every_weighting():
    for prediction, weighting in itertools.product(("eps", "x0", "v", "mean"), ("none", "p2", "min_snr(gamma=3)")):
        rules.check(changed(model__prediction=prediction, objective__weighting=weighting))


@pytest.mark.parametrize(
    "decay, num_steps, words",
    [
        (0.9999, 200, "will still weight its start by 98%; ema.decay=0.95 forgets it"),
        (0.999, 600, "will still weight its start by 55%; ema.decay=0.98 forgets it"),
        (0.99999, 50_000, "will still weight its start by 61%; ema.decay=0.9998 forgets it"),
        (0.9999, 8000, None),
        (0.9999, 800_000, None),
        (0.0, 1, None),
    ],
)
def test_an_average_that_is_mostly_what_it_starts_from_is_told(decay, num_steps, words):
    found = rules.hints(changed(ema__decay=decay, train__num_steps=num_steps))
    assert [hint.partition("sampled ")[2] for hint in found] == ([words] if words else [])


@pytest.mark.parametrize(("every", "validation", "is_told"), [(200, 0, True), (200, -1, False), (0, 0, False)])
def test_validations_without_validation_images_are_told(every, validation, is_told):
    config = changed(train__validate_every=every, data__validation=validation, ema__decay=0.0)
    words = f"train.validate_every={every} has no effect: data.validation=0"
    assert [hint.partition(" sets no")[0] for hint in rules.hints(config)] == ([words] if is_told else [])
