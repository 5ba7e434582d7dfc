"""What the benchmarks rest on: arms that take turns, ratios within a round, and a count of work that adds up."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import compiled, sampling, scaling, timing
from diffusion.experiment import build, memory


def test_arms_take_turns():
    calls = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.alternate(arms, rounds=3)
    assert calls == list("aabb" + "ab" * 3)
    assert all(len(values) == 3 and np.all(values > 0) for values in seconds.values())


def test_a_ratio_compares_the_best_of_each_side_round_by_round():
    """A machine that slows down eightfold between the rounds leaves it as it is."""
    speed = np.array([1.0, 8.0, 2.0])
    seconds = {"ours": speed, "ours, slower": 3 * speed, "theirs": 2 * speed, "theirs, slower": 5 * speed}
    ratio = timing.best_ratio(seconds, ["ours", "ours, slower"], ["theirs", "theirs, slower"])
    assert (ratio["ours"], ratio["theirs"]) == ("ours", "theirs")
    assert ratio["theirs / ours"] == {"median": 2.0, "quartile_1": 2.0, "quartile_3": 2.0}


def test_the_work_of_ho_et_al_on_paper():
    """35.7M parameters, 11.67 GFLOP per image forward; with remat and two devices each does 4/3 of half."""
    one = scaling.row("devices", 32, 128, 128, devices=1, remat=False)
    remat = scaling.row("remat", 32, 128, 128, devices=2, remat=True)
    np.testing.assert_allclose(one["parameters, million"], 35.746307)
    np.testing.assert_allclose(one["TFLOP per step and device"], 3 * 128 * 11.67e-3, rtol=0.01)
    np.testing.assert_allclose(remat["TFLOP per step and device"], one["TFLOP per step and device"] * 4 / 3 / 2)
    # Parameters, EMA and Adam's two moments, and little else.
    np.testing.assert_allclose(one["checkpoint, GiB"], 4 * 35.746307e6 * 4 / 2**30, rtol=1e-3)
    state = one["checkpoint, GiB"] * 5 / 4  # and the gradient
    assert 0 < remat["memory, GiB, at most"] - state < 0.5 * (one["memory, GiB, at most"] - state) / 2


def test_the_work_of_a_compiled_loop_is_that_of_its_kernels_times_its_trips():
    """One kernel sums a slice of 4 numbers, one reads and writes all 10,000, one counts: 1,000 times."""

    def step(x, _):
        return jnp.sin(x) * 2 + x[:4].sum(), None

    loop = jax.jit(lambda x: jax.lax.scan(step, x, length=1000)[0])
    kernels, moved = compiled.work(loop.lower(jnp.zeros(10_000)).compile().as_text())
    copies = kernels - 3 * 1000  # of what the loop begins with, if XLA makes any
    assert copies in (0, 1, 2)
    np.testing.assert_allclose(moved, 1000 * (2 * 40_000 + 16 + 4 + 4 + 12), atol=copies * 2 * 40_000)


def test_the_programs_for_absent_devices_take_what_training_and_sampling_take(tiny):
    """Every device holds the seed, the state and the images, or the model; and its share of the batch."""
    experiment, targets = build.experiment(tiny(), (8, 8, 1), 17), jax.devices()[:2]

    def argument_bytes(program):
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(program.args_info)]
        return memory.num_bytes(leaves) / len(targets)

    state = experiment.abstract_state()
    training = compiled.lower_training(experiment, 8, targets, steps=3, num_images=50)
    assert argument_bytes(training) == 4 + memory.num_bytes(state) + 50 * 64 + 3 * 8 * 4
    spaced = jax.eval_shape(lambda params: sampling.spaced(experiment.model(params), 4), state.params)
    chain = compiled.lower_sampling(experiment, 8, targets, steps=4)
    assert argument_bytes(chain) == memory.num_bytes(spaced) + 8 * 4
