"""Working directories: the run that owns one, who may write into it, and the files kept between programs."""

import json
import multiprocessing
import os
import signal
import socket

import jax
import numpy as np
import pytest

from configs import digits_fixed
from diffusion import data
from diffusion.experiment import build, ema, memory, workdir
from diffusion.experiment import config as config_lib
from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.variances import X0Variance


def config(**keys):
    made = digits_fixed.get_config()
    with made.unlocked():
        made.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return made


def test_a_stranger_file_is_no_obstacle_unless_a_run_would_overwrite_it(tmp_path):
    for name in ("slurm-4711.out", "thesis.txt", "config.json.4f1c.tmp"):
        (tmp_path / name).write_text("mine")
    workdir.check(config(), tmp_path)
    (tmp_path / "samples.png").write_text("mine, too")
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\), but samples.png, which a run would over"):
        workdir.check(config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_file_is_no_working_directory(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is not a directory"):
        workdir.check(config(), tmp_path / "notes")


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[1, 2]", "\0" * 100])
def test_a_damaged_config_is_a_one_line_error(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    for read in (lambda: workdir.check(config(), tmp_path), lambda: workdir.read_config(tmp_path)):
        with pytest.raises(ValueError, match="config.json is damaged"):
            read()


def own(directory, acquired, leave):
    with workdir.owned(config(), directory):
        acquired.set()
        leave.wait(60)


def test_a_second_run_in_one_directory_is_refused_and_a_killed_one_leaves_it_free(tmp_path):
    context = multiprocessing.get_context("fork")
    acquired, leave = context.Event(), context.Event()
    owner = context.Process(target=own, args=(tmp_path, acquired, leave))
    owner.start()
    assert acquired.wait(60)
    words = rf"in use by process {owner.pid} on {socket.gethostname()} since \d+-\d+-\d+ \d+:\d+:\d+; wait for it"
    with pytest.raises(ValueError, match=words):
        with workdir.owned(config(), tmp_path):
            pass
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    for _ in range(2):  # and whoever leaves leaves it free, too
        with workdir.owned(config(), tmp_path) as directory:
            assert directory == tmp_path
            assert f"process {os.getpid()} on" in (tmp_path / files.LOCK).read_text()


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with workdir.owned(config(), tmp_path / "file" / "run"):
            pass


def test_another_config_is_refused_by_key_and_nothing_changes(tmp_path):
    workdir.claim(config(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    workdir.claim(config(eval__num_images=5), tmp_path)  # what may differ is kept as it is now
    with pytest.raises(ValueError, match=r"another config \(optim.learning_rate: 0.002 → 0.5; seed: 0 → 7\)"):
        workdir.claim(config(seed=7, optim__learning_rate=0.5), tmp_path)
    assert workdir.read_config(tmp_path).eval.num_images == 5
    workdir.claim(config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_of_another_version_is_continued_unless_it_has_a_key_that_this_one_lacks(tmp_path):
    saved = json.loads(config().to_json())
    del saved["optim"]["grad_clip"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    workdir.check(config(), tmp_path)
    with pytest.raises(ValueError, match=r"another config \(optim.grad_clip: 1.0 → 2.0\)"):
        workdir.check(config(optim__grad_clip=2.0), tmp_path)
    saved["optim"]["later"], saved["version"] = 1, "9.0"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    words = "config.json has the config key optim.later, which version .* does not have; version 9.0 wrote it$"
    with pytest.raises(ValueError, match=words):
        workdir.check(config(), tmp_path)


def test_a_finished_run_that_becomes_longer_keeps_its_summary_under_its_step(tmp_path):
    short, long = (config(optim__decay="constant", train__num_steps=n) for n in (6, 9))
    workdir.claim(short, tmp_path)
    assert not workdir.is_finished(tmp_path) and not workdir.is_finished(tmp_path, short)
    (tmp_path / "summary.json").write_text('{"step": 6}')
    workdir.claim(short, tmp_path)
    assert workdir.is_finished(tmp_path) and workdir.is_finished(tmp_path, short)
    assert not workdir.is_finished(tmp_path, long)
    workdir.claim(long, tmp_path)
    assert (tmp_path / "summary_6.json").read_text() == '{"step": 6}' and not (tmp_path / "summary.json").exists()
    assert workdir.read_config(tmp_path).train.num_steps == 9
    assert not workdir.is_finished(tmp_path) and not workdir.is_finished(tmp_path, long)
    workdir.claim(long, tmp_path)
    with pytest.raises(ValueError, match=r"\(train.num_steps: 9 → 6, but a run can only become longer\)"):
        workdir.claim(short, tmp_path)


def test_what_an_error_about_memory_advises_the_run_may_do():
    small = config(unet__channels=8, train__batch_size=32)
    experiment = build.experiment(small, (8, 8, 1), 17)
    with pytest.raises(MemoryError, match="set unet.remat=True, or train.grad_accum higher, or train.batch_size"):
        with memory.shortage_explained(experiment):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert config_lib.differing(config(unet__channels=8, unet__remat=True, train__grad_accum=2), small) == []
    for key in ("eval.batch_size", "sample.batch_size"):
        with pytest.raises(MemoryError, match=f"{key}=256 is 32 images per device at a time; set {key} lower$"):
            with memory.shortage_explained(experiment, key):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_where_there_is_no_run_nothing_is_read(tmp_path):
    for read in (workdir.read_config, workdir.load):
        with pytest.raises(FileNotFoundError, match="holds no run"):
            read(tmp_path)


def test_the_estimated_variance_belongs_to_the_weights_it_was_estimated_of(tmp_path):
    def weights(step, value=1.0):
        return ema.EmaState(np.int32(step), {"w": np.full(3, value, np.float32)})

    tables = [np.linspace(0, 1, 5, dtype=np.float32) * i for i in (1.0, 0.1, 0.9, 0.2)]
    analytic, error = X0Variance(*tables[:2]), X0Variance(*tables[2:])
    with pytest.raises(FileNotFoundError, match="experiments.variance_accounting --workdir=.* writes"):
        ema.load_x0_variance(tmp_path, weights(7))
    ema.save_x0_variance(tmp_path, analytic, error, weights(7))
    loaded = ema.load_x0_variance(tmp_path, weights(7))
    np.testing.assert_array_equal(loaded.mean, analytic.mean)
    np.testing.assert_array_equal(loaded.stderr, analytic.stderr)
    for other in (weights(8), weights(7, 2.0)):
        with pytest.raises(ValueError, match="was estimated with the weights of step 7, which are not those of this"):
            ema.load_x0_variance(tmp_path, other)
    # Earlier versions wrote the step alone.
    np.savez(tmp_path / ema.X0_VARIANCE, analytic=tables[0], analytic_stderr=tables[1], step=7)
    np.testing.assert_array_equal(ema.load_x0_variance(tmp_path, weights(7, 2.0)).mean, analytic.mean)
    with pytest.raises(ValueError, match="was estimated with the weights of step 7"):
        ema.load_x0_variance(tmp_path, weights(8))


def test_a_run_is_loaded_as_objects_with_the_averaged_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "describe", lambda name, *_: data.Description(name, 9, 9, (8, 8, 1), 17, 0))
    small = config(
        unet__channels=4, unet__num_groups=2, unet__channel_mult=(1,), unet__attention_resolutions=(),
        schedule__num_steps=5,
    )  # fmt: skip
    experiment = build.experiment(small, (8, 8, 1), 17)
    state = jax.device_get(experiment.initial_state())
    average = jax.tree.map(lambda leaf: leaf + np.float32(1), state.params)
    workdir.claim(small, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state.replace(step=np.int32(3), ema_params=average), {"val_loss": 1.0})
    run = workdir.load(f"{tmp_path}@3")
    size = sum(leaf.size for leaf in jax.tree.leaves(average))
    assert repr(run).startswith(f"LoadedRun('{tmp_path}', step 3, Model(") and f" {size:,} parameters)" in repr(run)
    assert len(repr(run)) < 1000
    assert (run.state.step, run.image_shape, run.config.schedule.num_steps) == (3, (8, 8, 1), 5)
    assert (run.model.num_levels, run.model.p, run.model.schedule.num_steps) == (17, experiment.p, 5)
    jax.tree.map(np.testing.assert_array_equal, run.model.denoise.args[0], average)
