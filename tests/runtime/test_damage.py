"""Damaged checkpoints are noticed, named and moved aside, and nothing wrong is ever restored."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion.runtime.checkpoint import Checkpoints, DamagedCheckpoint


def make_state(step=0, channels=3):
    """A training state in miniature."""
    kernel = np.random.default_rng(step).normal(size=(3, 3, 1, channels)).astype(np.float32)
    params = {"conv_in": {"kernel": kernel, "bias": np.full(channels, -0.0, np.float32)}}
    return {"step": np.int32(step), "params": params, "ema_params": jax.tree.map(np.float16, params)}


def assert_identical(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three sound checkpoints."""
    directory = tmp_path_factory.mktemp("three")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"val_loss": 1.0 / step})
    return directory


@pytest.fixture
def run(three, tmp_path):
    """A copy of them to damage."""
    return Path(shutil.copytree(three, tmp_path / "run"))


def data_files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("d/*") if path.is_file())


def swap_with(other: Path, step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(other, step)


def overwrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(content: bytes, at: float) -> bytes:
    byte = int(at * (len(content) - 1))
    return content[:byte] + bytes([content[byte] ^ 0x10]) + content[byte + 1 :]


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "an empty step directory": lambda step: (shutil.rmtree(step), step.mkdir()),
    "a step that is a file": lambda step: (shutil.rmtree(step), step.write_text("3")),
    "a flipped bit in the middle of the data": lambda step: overwrite(data_files(step)[0], lambda b: flip(b, 0.5)),
    "a flipped bit in all data files": lambda step: [overwrite(f, lambda b: flip(b, 0.7)) for f in data_files(step)],
    "truncated data": lambda step: [overwrite(f, lambda b: b[: len(b) // 2]) for f in data_files(step)],
    "data without their last byte": lambda step: [overwrite(f, lambda b: b[:-1]) for f in data_files(step)],
    "zeroed data": lambda step: [overwrite(f, lambda b: bytes(len(b))) for f in data_files(step)],
    "empty data files": lambda step: [f.write_bytes(b"") for f in data_files(step)],
    "missing data": lambda step: [f.unlink() for f in data_files(step)],
    "random data": lambda step: [f.write_bytes(np.random.default_rng(0).bytes(500)) for f in data_files(step)],
    "a zeroed manifest": lambda step: overwrite(step / "state" / "manifest.ocdbt", lambda b: bytes(len(b))),
    "a truncated manifest": lambda step: overwrite(step / "state" / "manifest.ocdbt", lambda b: b[:20]),
    "a missing manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "a missing tree of names": lambda step: (step / "state" / "_METADATA").unlink(),
    "an empty tree of names": lambda step: (step / "state" / "_METADATA").write_bytes(b""),
    "a renamed leaf": lambda step: edit(step / "state" / "_METADATA", "conv_in", "conv_1n"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no metrics": lambda step: shutil.rmtree(step / "metrics"),
    "another score": lambda step: edit(step / "metrics" / "metrics", "0.33", "0.03"),
    "no digests": lambda step: shutil.rmtree(step / "digests"),
    "truncated digests": lambda step: overwrite(step / "digests" / "metadata", lambda b: b[:50]),
    "another leaf's digest": lambda step: edit(step / "digests" / "metadata", "conv_in/bias", "conv_in/bios"),
    "an earlier step under this name": lambda step: swap_with(step.parent / "1", step),
    "a save that was broken off": lambda step: step.rename(step.with_name("3.orbax-checkpoint-tmp-17")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_named_and_moved_aside_and_the_newest_sound_step_is_used(kind, run, caplog):
    DAMAGE[kind](run / "3")
    before = sorted(path.name for path in run.iterdir())
    with Checkpoints(run) as checkpoints:
        assert_identical(checkpoints.restore(None, make_state()), make_state(2))
        assert before == sorted(path.name for path in run.iterdir()), "reading moves nothing"
        caplog.clear()
        assert_identical(checkpoints.resume(make_state()), make_state(2))
        assert checkpoints.latest_step() == 2
    # asyncio logs the failed tasks of an earlier reading whenever they happen to be collected.
    (message,) = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert str(run / "3") in message and "moved to" in message
    assert sorted(path.name for path in run.iterdir()) == ["1", "2", "damaged"]
    assert len(list((run / "damaged").glob("3*/3*"))) == 1


def test_a_step_whose_first_checkpoint_was_damaged_is_saved_again(run):
    DAMAGE["zeroed data"](run / "3")
    with Checkpoints(run) as checkpoints:
        checkpoints.resume(make_state())
        checkpoints.save(3, make_state(3), {"val_loss": 1.0})
        assert_identical(checkpoints.resume(make_state()), make_state(3))


def test_wherever_a_bit_flips_nothing_wrong_is_restored(three, tmp_path):
    """Some bits carry nothing (times, padding); then what is restored is what was saved."""
    files = [path.relative_to(three) for path in sorted((three / "3").rglob("*")) if path.is_file()]
    rng, noticed = np.random.default_rng(0), 0
    for number, path in enumerate(files):
        run = Path(shutil.copytree(three, tmp_path / str(number)))
        overwrite(run / path, lambda content: flip(content, rng.uniform()))
        with Checkpoints(run) as checkpoints:
            restored = checkpoints.resume(make_state())
        was_noticed = (run / "damaged").exists()
        assert_identical(restored, make_state(2 if was_noticed else 3))
        noticed += was_noticed
    assert noticed >= 3


def test_the_leaf_that_is_not_what_was_saved_is_named(run):
    digests = json.loads((run / "3" / "digests" / "metadata").read_text())
    digests["sha256"]["params/conv_in/kernel"] = "0" * 64
    (run / "3" / "digests" / "metadata").write_text(json.dumps(digests))
    with Checkpoints(run) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="3 is damaged: params/conv_in/kernel is not what was saved"):
            checkpoints.restore(3, make_state())


def test_where_nothing_is_sound_nothing_is_begun_anew_and_nothing_is_moved(run):
    for step in (1, 2, 3):
        DAMAGE["missing data"](run / str(step))
    before = sorted(path for path in run.rglob("*"))
    with Checkpoints(run) as checkpoints:
        words = "no sound checkpoint .*3 is damaged.*2 is damaged.*1 is damaged"
        with pytest.raises(DamagedCheckpoint, match=words) as error:
            checkpoints.resume(make_state())
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            checkpoints.restore(None, make_state())
    assert "\n" not in str(error.value)
    assert sorted(path for path in run.rglob("*")) == before


def test_where_nothing_was_saved_there_is_nothing_to_resume(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.resume(make_state()) is None
    assert not (tmp_path / "none").exists()


def test_orbax_s_own_list_of_items_is_not_needed(run):
    (run / "3" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(run) as checkpoints:
        assert_identical(checkpoints.resume(make_state()), make_state(3))
    assert not (run / "damaged").exists()


def test_another_architecture_is_no_damage(run):
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match="params/conv_in/bias has shape") as raised:
            checkpoints.resume(make_state(channels=2))
        assert not isinstance(raised.value, DamagedCheckpoint)
    assert not (run / "damaged").exists()


# --- a part of a checkpoint


def test_entries_that_are_not_wanted_are_neither_returned_nor_in_the_way(run):
    """What is wrong with the parameters does not hinder reading their average; what is wrong with that does."""
    average = {name: make_state(3)[name] for name in ("step", "ema_params")}
    with Checkpoints(run) as checkpoints:
        assert_identical(checkpoints.restore(3, average), average)
        edit(run / "3" / "digests" / "metadata", '"params/conv_in/kernel": "', '"params/conv_in/kernel": "0')
        assert_identical(checkpoints.restore(3, average), average)
        assert_identical(checkpoints.restore(None, average), average)
        with pytest.raises(DamagedCheckpoint, match="3 is damaged: params/conv_in/kernel is not what was saved"):
            checkpoints.restore(3, make_state())
        edit(run / "3" / "digests" / "metadata", '"ema_params/conv_in/kernel": "', '"ema_params/conv_in/kernel": "0')
        with pytest.raises(DamagedCheckpoint, match="3 is damaged: ema_params/conv_in/kernel is not what was saved"):
            checkpoints.restore(3, average)
        assert checkpoints.restore(None, average)["step"] == 2


def test_what_is_read_of_a_damaged_file_is_what_was_saved_or_an_error(tmp_path):
    """Wherever a byte of the arrays changes, one of the two halves of the state can still be read."""
    rng = np.random.default_rng(0)
    state = {name: {"w": rng.normal(size=200_000).astype(np.float32)} for name in ("ema_params", "opt_state")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        outcomes = set()
        for path in data_files(tmp_path / "1"):
            whole = path.read_bytes()
            for at in np.linspace(0.05, 0.95, 4) if len(whole) > 100_000 else ():
                path.write_bytes(flip(whole, at))
                readable = []
                for name in state:
                    try:
                        assert_identical(checkpoints.restore(1, {name: state[name]}), {name: state[name]})
                        readable.append(name)
                    except DamagedCheckpoint:
                        pass
                outcomes.add(tuple(readable))
                path.write_bytes(whole)
    assert outcomes == {("ema_params",), ("opt_state",)}


def test_an_entry_that_the_config_wants_must_be_there_as_it_wants_it(run):
    wider = {"ema_params": make_state(channels=4)["ema_params"]}
    more = {"ema_params": make_state()["ema_params"] | {"conv_out": np.zeros(1)}}
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match="ema_params/conv_in/bias has shape"):
            checkpoints.restore(3, wider)
        with pytest.raises(ValueError, match="ema_params/conv_out, which the config wants, is not in"):
            checkpoints.restore(3, more)


def test_every_checkpoint_knows_what_it_was_trained_on(run):
    with Checkpoints(run, data_sha256={"train": "ab", "test": "cd"}) as checkpoints:
        assert checkpoints.trained_on() == {}
        checkpoints.save(4, make_state(4), {})
        checkpoints.wait()
        assert checkpoints.trained_on() == {"train": "ab", "test": "cd"}
