"""Saved states come back bit by bit, and unreadable checkpoints never stand in the way."""

import resource
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct, traverse_util
from orbax.checkpoint.experimental import v1

from diffusion.runtime import checkpoint
from diffusion.runtime.checkpoint import Checkpoints, DamagedCheckpoint
from diffusion.runtime.digests import leaf_sha256, named_leaves


@struct.dataclass
class State:
    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


def make_state(step: int = 0, channels: int = 3) -> State:
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 1, channels)), jnp.float32)
    params = {"conv_in": {"kernel": kernel, "bias": jnp.asarray([0.0, -0.0, np.nan][:channels], jnp.float32)}}
    schedule = optax.linear_schedule(0.0, 1e-3, 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimizer.init(params)
    opt_state = jax.tree.map(lambda leaf: jnp.full_like(leaf, 5), opt_state)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return State(jnp.asarray(step, jnp.int32), params, half, opt_state)


def assert_identical(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == np.asarray(b).tobytes()


def test_orbax_s_next_api_reads_it(tmp_path):
    """Orbax 1.0 makes v1 the top level: then this tells whether checkpoints of today still open."""
    state = make_state(7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"val_loss": 1.0})
    saved = traverse_util.flatten_dict(v1.load(tmp_path / "7"), sep="/")
    leaves = named_leaves(state)
    assert saved.keys() == {path for path, _ in leaves}
    for path, leaf in leaves:
        assert saved[path].dtype == leaf.dtype and np.asarray(saved[path]).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("name", ["lr[0.1]", "back\\slash"])
def test_a_path_in_which_orbax_would_lose_the_arrays_is_refused(name, tmp_path):
    with Checkpoints(tmp_path / name) as checkpoints:
        with pytest.raises(ValueError, match=r"its path may have no \[ and no"):
            checkpoints.save(7, make_state(7), {"val_loss": 1.0})
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a b", "ü日本", "per%20cent#?*]", "12:30", "at@5", "new\nline", "{x}$HOME~"])
def test_any_other_path_will_do(name, tmp_path):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(7, state := make_state(7), {"val_loss": 1.0})
    with Checkpoints(tmp_path / name) as checkpoints:
        assert_identical(checkpoints.restore(7, state), state)


def test_round_trip_is_bit_identical(tmp_path):
    state = make_state(7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"val_loss": 1.0})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(None, jax.eval_shape(lambda: state))
    assert_identical(restored, state)
    assert restored.ema_params["conv_in"]["kernel"].dtype == jnp.bfloat16


def test_a_save_returns_before_its_digests_and_what_happens_to_the_buffers_then_is_not_saved(tmp_path, monkeypatch):
    changed = threading.Event()

    def late(*state, **options):
        assert changed.wait(60)
        return leaf_sha256(*state, **options)

    state = {"w": np.ones(2_000_000, np.float32), "v": jnp.ones(2_000_000)}
    overwrite = jax.jit(lambda v: v + 1, donate_argnums=0)
    monkeypatch.setattr(checkpoint, "leaf_sha256", late)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state["w"][:] = 2.0
        for _ in range(3):
            state["v"] = overwrite(state["v"])
        assert not (tmp_path / "1").exists()  # without its digests it is not complete
        changed.set()
        restored = checkpoints.restore(1, state)
    assert np.all(restored["w"] == 1.0) and np.all(restored["v"] == 1.0)


def test_the_last_few_and_the_best_are_kept(tmp_path):
    losses = {10: 5.0, 20: 1.0, 30: 4.0, 40: 3.0, 50: 2.0, 60: 6.0}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {"val_loss": loss, "other": -loss})
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (20, 60)
        best = checkpoints.restore(20, make_state())
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [20, 50, 60]
    assert_identical(best, make_state(20))


def test_a_checkpoint_that_was_not_scored_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": np.zeros(1)}, {})
        with pytest.raises(ValueError, match="nothing unseen ranks the checkpoints of .*data.validation is 0"):
            checkpoints.best_step()
        checkpoints.save(2, {"w": np.zeros(1)}, {"val_loss": 9.0})
        checkpoints.save(3, {"w": np.zeros(1)}, {})
        assert checkpoints.best_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_run_of_an_earlier_version_is_ranked_by_its_test_images_and_says_so(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            checkpoints.save(step, make_state(step), {"test_loss": loss})
        assert checkpoints.best_step() == 2
    assert "are ranked by test images" in caplog.text


def test_a_directory_without_a_complete_checkpoint_is_passed_over_and_not_deleted(tmp_path):
    for step in (1, 2):
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(step, make_state(step), {"val_loss": 3.0 - step})
    (tmp_path / "3").mkdir()
    (tmp_path / "9" / "state").mkdir(parents=True)
    (tmp_path / "9" / "state" / "half").write_text("a copy that was broken off")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == checkpoints.best_step() == 2
        assert_identical(checkpoints.restore(None, make_state()), make_state(2))
        checkpoints.save(8, make_state(8), {"val_loss": 0.5})
        checkpoints.save(9, make_state(9), {"val_loss": 0.1})
    with Checkpoints(tmp_path) as checkpoints:
        assert_identical(checkpoints.restore(None, make_state()), make_state(9))
    assert (tmp_path / "3").exists() and not (tmp_path / "8").exists()
    (moved_aside,) = (tmp_path / "damaged").glob("9-*/9")
    assert (moved_aside / "state" / "half").read_text() == "a copy that was broken off"


def test_saving_a_step_again_leaves_the_first(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), {"val_loss": 1.0})
        checkpoints.save(5, make_state(6), {"val_loss": 0.0})
        assert_identical(checkpoints.restore(5, make_state()), make_state(5))


def test_another_architecture_is_refused_by_leaf(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": make_state(1).params}, {})
        wider = {"params": make_state(1, channels=2).params}
        with pytest.raises(ValueError, match=r"params/conv_in/bias has shape \(3,\).*config wants \(2,\)"):
            checkpoints.restore(1, wider)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"params": make_state(1).params})
        with pytest.raises(ValueError, match="params/conv_in/bias .*float32.*wants .*bfloat16"):
            checkpoints.restore(1, half)
        with pytest.raises(ValueError, match="params/conv_out, which the config wants, is not in"):
            checkpoints.restore(1, {"params": make_state(1).params | {"conv_out": np.zeros(1)}})
        with pytest.raises(ValueError, match="params/conv_in/kernel, which is in .* has no place"):
            checkpoints.restore(1, {"params": {"conv_in": {"bias": np.zeros(3, np.float32)}}})


def test_a_directory_that_does_not_exist_has_no_checkpoints_and_is_not_created(tmp_path):
    with Checkpoints(tmp_path / "runs" / "none") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match="no checkpoint in .*none"):
            checkpoints.best_step()
        with pytest.raises(FileNotFoundError, match="no checkpoint in .*none"):
            checkpoints.restore(None, make_state())
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
            checkpoints.restore(3, make_state())
    assert not (tmp_path / "runs").exists()


def test_a_damaged_checkpoint_says_so_in_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    (tmp_path / "1" / "state" / "manifest.ocdbt").write_bytes(b"\0" * 100)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="the checkpoint .*1 is damaged and cannot be read") as raised:
            checkpoints.restore(1, make_state())
    assert "\n" not in str(raised.value)


def test_a_save_that_fails_leaves_the_last_sound_one(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="the checkpoint of step 2 could not be written") as raised:
            with Checkpoints(tmp_path, keep=1) as checkpoints:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
                checkpoints.save(2, {"w": np.random.default_rng(0).random(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(raised.value)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert_identical(checkpoints.resume(make_state()), make_state(1))


def test_an_error_is_blamed_on_a_save_only_while_there_is_one(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("Event loop is closed")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "wait_until_finished", broken)
            with pytest.raises(RuntimeError, match="^Event loop is closed$"):
                checkpoints.wait()
        checkpoints.save(1, make_state(1), {})
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "wait_until_finished", broken)
            with pytest.raises(OSError, match=r"step 1 could not be written to .* \(Event loop is closed\)"):
                checkpoints.wait()
        checkpoints.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "wait_until_finished", broken)
            with pytest.raises(RuntimeError, match="^Event loop is closed$"):
                checkpoints.wait()


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="last 0"):
        Checkpoints(tmp_path, keep=0)
