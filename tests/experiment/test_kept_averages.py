"""The averages that a run saves, and averages of any length that are composed of them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion import post_hoc_ema
from diffusion.experiment import kept_averages
from diffusion.experiment.ema import EmaState, ema_of
from diffusion.programs import scored
from diffusion.training.step import TrainState

TRACKED, EVERY, NUM_STEPS = (0.05, 0.1), 4, 400
LIKE = EmaState(jax.ShapeDtypeStruct((), jnp.int32), {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def state_at(step, params, averages):
    return TrainState(np.int32(step), {"w": params}, {"w": params}, (), (), {}, averages)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with the averages of a walk, and by its step the one of length 0.07 that was tracked directly."""
    directory = tmp_path_factory.mktemp("run")
    theta = np.sin(np.outer(np.arange(1, NUM_STEPS + 1), [0.002, 0.004, 0.006])).astype(np.float32)

    def step(averages, at):
        averages = post_hoc_ema.track(averages, at[1], at[0], (*TRACKED, 0.07))
        return averages, averages

    steps = jnp.arange(1, NUM_STEPS + 1)
    _, averages = jax.lax.scan(step, (jnp.zeros(3),) * 3, (steps, jnp.asarray(theta)))
    with kept_averages.AveragesKept(directory / "checkpoints", every=EVERY, keep=2) as checkpoints:
        for n in [*range(EVERY, NUM_STEPS + 1, EVERY), NUM_STEPS - 1]:
            of_step = tuple({"w": np.asarray(average[n - 1])} for average in averages[:2])
            if n < NUM_STEPS - 1:
                kept_averages.write(directory / kept_averages.FOLDER, n, of_step)
            else:  # as the last save, and as one that a signal asked for
                checkpoints.save(n, state_at(n, theta[n - 1], of_step), {})
    return directory, np.asarray(averages[2])


def read(directory, step, length):
    ema = ConfigDict({"post_hoc": TRACKED, "length": length})
    with kept_averages.AveragesKept(directory / "checkpoints", every=EVERY, keep=2) as checkpoints:
        return kept_averages.read(checkpoints, step, LIKE, ema)


def test_regular_saves_keep_their_averages_and_others_none(run):
    directory, _ = run
    kept = kept_averages.kept_steps(directory / kept_averages.FOLDER)
    assert kept == list(range(EVERY, NUM_STEPS + 1, EVERY))


@pytest.mark.parametrize("step", [NUM_STEPS, NUM_STEPS - 1])
def test_another_length_is_composed_at_every_checkpoint(run, step):
    directory, direct = run
    found = read(directory, step, 0.07)
    assert int(found.step) == step and found.ema_params["w"].dtype == np.float32
    np.testing.assert_allclose(found.ema_params["w"], direct[step - 1], atol=1e-6)
    assert np.abs(read(directory, step, 0.0).ema_params["w"] - direct[step - 1]).max() > 0.01


def test_too_few_kept_steps_for_a_length_are_said(run, tmp_path, caplog):
    directory, _ = run
    read(directory, NUM_STEPS, 0.2)
    assert not caplog.messages
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    read(tmp_path, NUM_STEPS, 0.2)
    (message,) = caplog.messages
    assert "ema.length=0.2: the weights composed of 1 kept steps are 60% away" in message


def test_the_keys_reach_training_and_the_protocol(layer):
    import toy

    made = toy.experiment(ema__post_hoc=TRACKED, ema__length=0.07)
    assert made.training.power_ema == TRACKED and toy.experiment().training.power_ema == ()
    assert scored.protocol_of(made, "fixed_large")["parameters"] == "EMA, length 0.07"


def test_training_ends_with_the_other_average():
    with pytest.raises(ValueError, match=r"ema.length=0.07 is composed after training.*use it in --mode=eval"):
        kept_averages.check_training(ConfigDict({"ema": {"length": 0.07}}))


def test_a_damaged_average_is_named(run, tmp_path):
    directory, _ = run
    path = directory / kept_averages.FOLDER / "40.safetensors"
    sound = path.read_bytes()
    try:
        for damaged in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[: len(sound) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="40.safetensors is damaged.*composed of the others"):
                read(directory, NUM_STEPS, 0.07)
    finally:
        path.write_bytes(sound)


def test_without_averages_nothing_is_written(tmp_path):
    with kept_averages.AveragesKept(tmp_path / "checkpoints", every=1) as checkpoints:
        checkpoints.save(1, state_at(1, np.zeros(3, np.float32), ()), {})
    assert not (tmp_path / kept_averages.FOLDER).exists()
    with kept_averages.AveragesKept(tmp_path / "checkpoints", every=1) as checkpoints:
        like = ema_of(state_at(0, np.zeros(3, np.float32), ()))
        assert int(kept_averages.read(checkpoints, None, like, ConfigDict({"post_hoc": (), "length": 0.0})).step) == 1
