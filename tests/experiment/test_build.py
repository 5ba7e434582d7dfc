"""Configs as objects: names and their arguments reach the functions, and a model matches its config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_fixed
from diffusion import learned_schedule, objectives, process, reverse, schedules
from diffusion.evaluation import quality
from diffusion.evaluation.features import Features
from diffusion.experiment import build
from diffusion.training import optimizer
from diffusion.variances import X0Variance

SHAPE, NUM_LEVELS = (8, 8, 1), 17
X = jax.random.normal(jax.random.key(0), (2, *SHAPE))
T = jnp.asarray([0.0, 3.0])


def tiny(**keys):
    config = digits_fixed.get_config()
    small = {
        "unet.channels": 4, "unet.num_groups": 2, "unet.channel_mult": (1,), "unet.attention_resolutions": (),
        "unet.fourier_features": (), "schedule.num_steps": 5,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return config


def made(**keys):
    return build.experiment(tiny(**keys), SHAPE, NUM_LEVELS)


@pytest.fixture(scope="module")
def params():
    """Of the tiny network, of ordinary size everywhere: at the start it outputs almost nothing."""
    rng = np.random.default_rng(0)
    shapes = made().abstract_state().params
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)


def test_arguments_of_the_network_go_before_its_group_and_both_before_its_defaults():
    network = made(model__network="unet(channels=8, dropout=0.25)", unet__dropout=0.5).training.network
    assert (network.channels, network.dropout, network.num_groups, network.out_channels) == (8, 0.25, 2, 2)
    config = tiny(model__network="unet(channels=16, num_groups=4, attention_resolutions=(4,), channel_mult=(1, 2))")
    with config.unlocked():
        del config.unet
    network = build.experiment(config, SHAPE, NUM_LEVELS).training.network
    assert (network.channels, network.num_groups, network.num_res_blocks) == (16, 4, 2)


@pytest.mark.parametrize(("on_cpu", "chosen"), [(True, "winograd"), (False, "xla")])
def test_the_convolution_follows_the_backend_where_the_config_does_not_say(on_cpu, chosen):
    def convolution(**keys):
        experiment = build.experiment(tiny(**keys), SHAPE, NUM_LEVELS, on_cpu=on_cpu)
        return experiment.training.network.convolution

    assert convolution() == chosen
    assert convolution(unet__convolution="xla") == "xla"
    assert convolution(model__network="unet(convolution='winograd')") == "winograd"
    older = tiny()  # a run made before the key existed
    with older.unlocked():
        del older.unet.convolution
    assert build.experiment(older, SHAPE, NUM_LEVELS, on_cpu=on_cpu).training.network.convolution == chosen


@pytest.mark.parametrize(("on_cpu", "given"), [(True, 8), (False, 64)])
def test_inception_takes_larger_batches_on_accelerators(on_cpu, given, monkeypatch):
    def inception(train_set, path: str = "", batch_size: int = 8):
        return Features(len, path, {"batch_size": batch_size})

    monkeypatch.setattr(build, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.setitem(quality.FEATURES, "inception", inception)
    config = tiny(quality__features="inception(path='file')")
    train_set = build.load_data(config, "train")
    found = build.quality_features(config, train_set)
    assert found.sha256 == "file" and found.facts == {"batch_size": given}
    assert build.quality_features(tiny(), train_set).facts == {}


def test_what_a_network_refuses_is_refused_here():
    with pytest.raises(ValueError, match="unet.channel_mult=.* halves images 4 times and .*, so .* not 8×8"):
        made(unet__channel_mult=(1, 1, 1, 1, 1))


def test_arguments_of_the_optimizer_and_its_decay_reach_them():
    keys = {"name": "adamw(b2=0.9, weight_decay=1)", "decay": "cosine(end=0.5)", "learning_rate": 0.1}
    keys |= {"warmup_steps": 2, "grad_clip": 3.0}
    ours = made(train__num_steps=6, **{f"optim__{key}": value for key, value in keys.items()}).training.optimizer

    def rule(rate):
        return optimizer.adamw(rate, b2=0.9, weight_decay=1.0)

    def decay(peak, num_steps):
        return optimizer.cosine(peak, num_steps, end=0.5)

    wanted = optimizer.make(rule, decay, 0.1, 6, warmup_steps=2, grad_clip=3.0)
    params = {"w": jnp.asarray([1.0, -2.0])}
    states = [made_of.init(params) for made_of in (ours, wanted)]
    for step in range(8):
        gradient = {"w": jnp.asarray([5.0, 0.1 * step])}
        with jax.numpy_dtype_promotion("standard"):
            (update, states[0]), (other, states[1]) = (
                made_of.update(gradient, state, params) for made_of, state in zip((ours, wanted), states, strict=True)
            )
        np.testing.assert_array_equal(update["w"], other["w"])


def test_the_network_is_clipped_and_a_learned_schedule_is_not():
    """Clipped gradients of the bound do not cancel: γ_T ran from 20 to 76 on photographs."""
    keys = {"grad_clip": 1.0, "learning_rate": 1.0, "warmup_steps": 0, "decay": "constant"}
    name = "learned(start='cosine', learning_rate=1.0)"
    config = {f"optim__{key}": value for key, value in keys.items()}
    ours = made(train__num_steps=2, schedule__name=name, **config).training.optimizer
    params = {"network": jnp.zeros(()), "schedule": jnp.zeros(())}
    state = ours.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in (1.0, -1000.0):
            gradients = jax.tree.map(lambda leaf, value=gradient: leaf + value, params)
            update, state = ours.update(gradients, state, params)

    def adam(first, second):  # the length of its second step, at a learning rate of 1
        mean, square = 0.1 * (0.9 * first + second) / 0.19, (0.999 * first**2 + second**2) / 1.999
        return -mean / square**0.5

    # 1 − 0.999², by which Adam divides, is right to 3e-5 in float32.
    assert update["network"] == pytest.approx(adam(1.0, -1.0), rel=1e-4)
    assert update["schedule"] == pytest.approx(adam(1.0, -1000.0), rel=1e-4)


def test_arguments_of_objective_weighting_and_timesteps_reach_them():
    training = made(
        model__prediction="eps",
        objective__name="hybrid(vlb_weight=0.25)",
        objective__weighting="min_snr(gamma=2)",
        objective__timesteps="loss_aware(history_length=3)",
    ).training
    p, row = reverse.make("eps", "learned_range"), schedules.cosine(5)[3]
    wanted = objectives.make("hybrid", p, 5, NUM_LEVELS, objectives.min_snr(p, gamma=2.0), vlb_weight=0.25)
    x0, eps, output = X[0].clip(-1, 1), X[1], jnp.concatenate([0.5 * X[1], X[0]], axis=-1)
    example = (row, x0, process.q_sample(row, x0, eps), eps, output)
    assert training.objective(*example)[0] == wanted(*example)[0]
    assert training.timesteps.init(5).losses.shape == (5, 3)


def test_an_objective_that_is_probed_gets_its_probe():
    for name in objectives.OF_EPS_VARIANCE:
        training = made(objective__name=name, model__variance="npr").training
        assert training.probed == (name == "ocm")


def test_settings_are_those_of_the_config():
    config = tiny(seed=4, train__sample_every=7, eval__terms_per_image=3, eval__batch_size=9, eval__protocol="ho2020")
    plan, settings = build.plan(config), build.bound_settings(config)
    elsewhere = {"seed": 4, "quality_every": 0, "steps_per_call": 1}  # the last on a CPU
    for field in dataclasses.fields(plan):
        assert getattr(plan, field.name) == elsewhere.get(field.name, config.train.get(field.name))
    assert dataclasses.asdict(settings) == {
        "seed": 4, "batch_size": 9, "protocol": "ho2020", "terms_per_image": 3, "noises_per_term": 1,
    }  # fmt: skip


# --- the model of an experiment


def test_a_model_is_the_network_with_its_reverse_process_and_schedule(params):
    experiment = made()
    model = experiment.model(params)
    output = experiment.training.network.apply({"params": params}, X, T)
    assert output.shape == (2, 8, 8, 2)
    np.testing.assert_allclose(jax.jit(lambda model: model.denoise(X, T))(model), output, rtol=1e-5, atol=1e-5)
    assert (model.p, model.num_levels) == (reverse.make("v", "learned_range"), NUM_LEVELS)
    np.testing.assert_array_equal(model.schedule.beta, schedules.cosine(5).beta)


def test_under_another_variance_the_network_s_own_is_not_read(params):
    experiment = made()
    fixed = experiment.model(params, "fixed_small")
    assert fixed.p == reverse.make("v", "fixed_small")
    whole = experiment.model(params).denoise(X, T)
    np.testing.assert_allclose(fixed.denoise(X, T), whole[..., :1], rtol=1e-6)


def test_the_optimal_variance_needs_its_estimate(params):
    with pytest.raises(ValueError, match="the optimal variance needs a trained mean"):
        made().model(params, "optimal")
    table = np.linspace(0, 1, 6, dtype=np.float32)
    model = made().model(params, "optimal", X0Variance(table, table))
    np.testing.assert_array_equal(model.schedule.x0_variance, table)
    assert model.p.variance == "optimal"


def test_a_variance_that_the_network_lacks_is_refused(params):
    for variance in ("fixed_smal", "learned"):
        with pytest.raises(ValueError, match=f"'{variance}' is not one of model, fixed_small, fixed_large, optimal"):
            made().model(params, variance)


def test_models_of_equal_configs_are_one_program(params):
    traced = []

    @jax.jit
    def output(model):
        traced.append(None)
        return model.denoise(X, T)

    for experiment in (made(), made()):
        output(experiment.model(params))
        output(experiment.model(jax.tree.map(lambda leaf: 2 * leaf, params)))
    assert len(traced) == 1


def test_a_learned_schedule_is_in_the_parameters(params):
    experiment = made(schedule__name="learned(start='cosine', inner='second_moment')")
    assert experiment.learns_schedule
    own = learned_schedule.init(experiment.start_schedule) | {"gamma_1": jnp.float32(-3.0)}
    model = experiment.model(params | {learned_schedule.SUBTREE: own})
    np.testing.assert_allclose(model.schedule.log_snr[1], 3.0, rtol=1e-6)
    np.testing.assert_allclose(experiment.start_schedule.beta, schedules.cosine(5).beta, rtol=1e-6)
    np.testing.assert_array_equal(model.denoise(X, T), experiment.model(params | {"schedule": own}).denoise(X, T))
    assert not made().learns_schedule


@pytest.mark.parametrize("schedule", ["cosine", "learned(start='cosine')"])
def test_with_rescale_t_training_and_the_model_tell_the_network_t_of_1000_steps(schedule, params):
    experiment = made(schedule__name=schedule, model__rescale_t=True)
    params = params | {learned_schedule.SUBTREE: learned_schedule.init(experiment.start_schedule)}
    rows = experiment.training.schedule.at_rows(lambda _, row: (row.network_t, {}), params, jnp.arange(1, 6))[0]
    np.testing.assert_allclose(rows, [0, 200, 400, 600, 800], rtol=1e-6)
    np.testing.assert_array_equal(experiment.model(params).schedule.network_t[1:], rows)
    plain = made(schedule__name=schedule).model(params).schedule.network_t
    np.testing.assert_array_equal(plain, np.arange(6) - 1)


def test_a_schedule_that_cannot_be_learned_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="cannot start where log SNR_T = −∞"):
        made(schedule__name="learned(start='harmonic')")
    with pytest.raises(ValueError, match="learning_rate=0.0 of learned must be in"):
        made(schedule__name="learned(learning_rate=0)")


def test_the_start_follows_the_seed_and_the_average_is_a_copy():
    first, again, other = (made(seed=seed).initial_state() for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first.params, first.ema_params)
    kernels = [state.params["conv_in"]["kernel"] for state in (first, other)]
    assert not np.array_equal(*kernels)
    shapes = made().abstract_state()
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, first, shapes))
