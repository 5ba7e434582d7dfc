"""The parts of the benchmarks: alternating arms, ratios within a round, and counts of work that add up."""

import argparse
import json
import mmap
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spawned

from benchmarks import compiled, likelihood, sampling, scaling, sides, timing, training
from benchmarks.timing import Arm, Cost
from diffusion.experiment import build, memory
from diffusion.runtime import allocator


def test_arms_take_turns():
    """Each round begins with another one."""
    calls = []
    arms = {name: Arm(partial(calls.append, name)) for name in "abc"}
    costs = timing.in_this_process(arms, rounds=4)
    assert calls == list("aabbcc" + "abc" + "bca" + "cab" + "abc")
    assert all(cost.seconds.shape == (4,) and np.all(cost.seconds > 0) for cost in costs.values())


def test_the_cost_of_a_call():
    """64 MiB are 16,384 pages; work takes CPU time, and sleep none."""
    cores = len(os.sched_getaffinity(0))

    def touch():
        with mmap.mmap(-1, 64 * 2**20) as memory:
            for start in range(0, len(memory), mmap.PAGESIZE):
                memory[start] = 1

    def work():
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    assert 16_384 <= timing.cost(touch).page_faults < 18_000
    sleeping, working = timing.cost(partial(time.sleep, 0.2)), timing.cost(work)
    # On a busy machine both take longer, but they use the same CPU time.
    assert sleeping.seconds >= 0.2 and working.seconds >= 0.2
    cpu_seconds = [cost.busy * cost.seconds * cores for cost in (sleeping, working)]
    np.testing.assert_allclose(cpu_seconds, [0, 0.2], atol=0.05)


def test_every_row_says_what_the_machine_did():
    cost = Cost(np.array([1.0, 2.0, 3.0]), np.array([5, 5, 5]), np.array([0.5, 0.5, 1.0]))
    (row,) = timing.rows({"ours": cost}, lambda name, seconds: {"total": f"{name} {seconds.sum()}"})
    assert list(row) == ["arm", "total", "page faults", "busy share"]
    assert (row["total"], row["page faults"]["median"], row["busy share"]["median"]) == ("ours 6.0", 5.0, 0.5)


@pytest.mark.skipif(not allocator._is_glibcs(), reason="needs glibc's own malloc")
def test_each_side_has_a_process_and_an_allocator(monkeypatch, tmp_path):
    """64 MiB that are freed and asked for again: the pages are new only where freed memory is not kept."""
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    foreign = tmp_path / "tests"  # torch-fidelity installs a top-level package of this name, which comes before ours
    foreign.mkdir()
    (foreign / "__init__.py").write_text("raise ImportError('a foreign package')")
    monkeypatch.syspath_prepend(tmp_path)
    args = argparse.Namespace(rounds=3, peer_allocator="default", name="of a flag")
    costs, columns = sides.measured(args, spawned.our_arms, spawned.peer_arms)
    assert list(costs) == ["ours of a flag", "theirs", "theirs, too"]
    ours, theirs, too = (columns[name]["process"] for name in costs)
    assert theirs == too and len({os.getpid(), ours, theirs}) == 3
    few = {name: np.median(cost.page_faults) < 16 for name, cost in costs.items()}
    assert few == {"ours of a flag": True, "theirs": False, "theirs, too": False}
    assert allocator.SWITCH not in os.environ


def test_an_error_of_a_side_s_input_is_raised_here_as_it_was_there():
    args = argparse.Namespace(rounds=1, peer_allocator="default")
    with pytest.raises(ValueError, match="^cannot keep 2000 of 1000 steps$"):
        sides.measured(args, spawned.refused_arms, None)


def test_a_side_whose_process_ends_stops_the_benchmark_in_one_line(capfd):
    args = argparse.Namespace(rounds=1, peer_allocator="default")
    with pytest.raises(RuntimeError, match="a side's process ended; its error is above"):
        sides.measured(args, spawned.broken_arms, None)
    assert "KeyError: 'of the program'" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "x", ""])
def test_a_size_is_an_integer_of_at_least_one(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        timing.arguments("A benchmark.", "name").parse_args([f"--rounds={value}"])
    assert capsys.readouterr().err == f"error: argument --rounds: {value!r} is not an integer ≥ 1; --help says more\n"


def test_the_peers_allocator_is_kept_or_a_library_that_exists(tmp_path):
    assert sides.peer_environment("kept") == {allocator.SWITCH: "1"}
    library = tmp_path / "libtcmalloc.so"
    library.touch()
    assert sides.peer_environment(str(library)) == {"LD_PRELOAD": str(library)}
    with pytest.raises(ValueError, match="--peer-allocator=libtcmaloc.so is neither"):
        sides.peer_environment("libtcmaloc.so")


def test_a_ratio_compares_the_best_of_each_side_round_by_round():
    """A machine that slows down eightfold between the rounds leaves it as it is."""
    speed = np.array([1.0, 8.0, 2.0])
    seconds = {"ours": speed, "ours, slower": 3 * speed, "theirs": 2 * speed, "theirs, slower": 5 * speed}
    ratio = timing.best_ratio(seconds, ["ours", "ours, slower"], ["theirs", "theirs, slower"])
    assert (ratio["ours"], ratio["theirs"]) == ("ours", "theirs")
    assert ratio["theirs / ours"] == {"median": 2.0, "quartile_1": 2.0, "quartile_3": 2.0}


@pytest.mark.slow
def test_the_work_of_ho_et_al_on_paper():
    """35.7M parameters, 11.67 GFLOP per image forward."""
    one = scaling.row("devices", 32, 128, 128, devices=1, remat=False)
    np.testing.assert_allclose(one["parameters, million"], 35.746307)
    np.testing.assert_allclose(one["TFLOP per step and device"], 3 * 128 * 11.67e-3, rtol=0.01)
    # Parameters, EMA and Adam's two moments, and little else.
    np.testing.assert_allclose(one["checkpoint, GiB"], 4 * 35.746307e6 * 4 / 2**30, rtol=1e-3)


@pytest.mark.slow
def test_with_remat_and_two_devices_each_does_four_thirds_of_half_and_keeps_less():
    one, remat = (scaling.row("remat", 16, 32, 512, devices, devices == 2) for devices in (1, 2))
    np.testing.assert_allclose(remat["TFLOP per step and device"], one["TFLOP per step and device"] * 4 / 3 / 2)
    state = one["checkpoint, GiB"] * 5 / 4  # and the gradient
    assert 0 < remat["memory, GiB, at most"] - state < 0.5 * (one["memory, GiB, at most"] - state) / 2


def test_the_bound_that_is_timed_has_every_term():
    """Whatever configs/cifar10.py estimates it from: its 9 terms are more than a timed call has."""
    args = argparse.Namespace(size="tiny", dtype="float32", batches=2)
    assert likelihood.our_arm(args, 3, None).columns == {"pairs": 6}


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


def test_a_training_s_curve_has_no_speed_where_its_steps_compiled(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "images_per_second": 9.0}, {"step": 3, "val_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training.curve(tmp_path)
    assert [(row["step"], row["images/s"]) for row in found] == [(1, None), (2, 9.0)]
    assert timing.table(found).count("\n") == 3
