"""Decoding is shared by the processes of a host, continues after a kill, and reports disk errors."""

import contextlib
import errno
import os
import threading
import time

import numpy as np
import pytest

from diffusion import data
from diffusion.data import decoded, decoders, stored_split, unfinished
from diffusion.data import tfds as prepared
from diffusion.data.resizing import Resizing
from diffusion.runtime import files
from diffusion.runtime.preemption import Preempted


@pytest.fixture
def small_parts(monkeypatch):
    """The 299 pictures are read in 15 parts, each of which is made safe."""
    monkeypatch.setattr(stored_split, "RECORDS_PER_READ", 20)
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", -1.0)


@pytest.fixture
def place(digits_copy):
    return digits_copy / "digits" / "1.0.0"


@pytest.fixture
def load(digits_copy):
    return lambda: data.load("digits", "test", str(digits_copy))


@pytest.fixture
def straight(digits_dir):
    return data.load("digits", "test", str(digits_dir))


@contextlib.contextmanager
def stopped_after(monkeypatch, num_parts, error):
    """`error` comes after so many parts were read, and is expected."""
    examples = stored_split._examples

    def some(*args):
        for number, part in enumerate(examples(*args)):
            if number == num_parts:
                raise error
            yield part

    with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error)):
        patch.setattr(stored_split, "_examples", some)
        yield


def left(place):
    return sorted(path.name for path in place.glob("*-test-*"))


def assert_same(source, straight):
    assert source.file.read_bytes() == straight.file.read_bytes()
    np.testing.assert_array_equal(source.classes, straight.classes)


def test_killed_ten_times_in_between_the_bytes_are_the_same(small_parts, place, load, straight, monkeypatch):
    """After a kill whatever follows the pictures that were made safe may be on the disk or not, in any state."""
    rng = np.random.default_rng(0)
    for number in range(10):
        with stopped_after(monkeypatch, 1, KeyboardInterrupt("stop")):
            load()
        for begin in ("decoded", "classes"):
            (path,) = place.glob(f"{begin}-test-*.unfinished")
            with path.open("r+b") as file:
                if number % 2:
                    file.seek(0, os.SEEK_END)
                    file.write(rng.bytes(rng.integers(100)))
    (count,) = place.glob("*.count")
    assert int(count.read_text()) == 10 * 20
    assert_same(load(), straight)
    assert [name.partition("-")[0] for name in left(place)] == ["classes", "decoded", "decoded"]  # and of which records


def test_what_was_not_made_safe_is_decoded_again(small_parts, place, load, straight, monkeypatch):
    with stopped_after(monkeypatch, 3, KeyboardInterrupt("stop")):
        load()
    (pixels,), (count,) = place.glob("decoded-test-*.unfinished"), place.glob("*.count")
    whole = pixels.read_bytes()
    for damaged in (b"", b"x", b"-1", b"1000"):
        pixels.write_bytes(whole)
        count.write_bytes(damaged)
        with stopped_after(monkeypatch, 0, KeyboardInterrupt("stop")):
            load()
        assert count.read_text() == "0"
    assert_same(load(), straight)


def test_of_two_at_once_one_decodes_and_the_other_waits_for_it(place, load, straight, monkeypatch, caplog):
    """Locks belong to open files, so that two threads are as two processes."""
    begins, ends, calls, examples, found = threading.Event(), threading.Event(), [], stored_split._examples, []

    def slow(*args):
        calls.append(args)
        begins.set()
        assert ends.wait(60)
        yield from examples(*args)

    monkeypatch.setattr(stored_split, "_examples", slow)
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.01)
    pair = [threading.Thread(target=lambda: found.append(load())) for _ in range(2)]
    pair[0].start()
    assert begins.wait(60)
    pair[1].start()
    while not caplog.messages:
        time.sleep(0.01)
    assert caplog.messages == ["waiting for another process, which decodes digits test"]
    ends.set()
    for thread in pair:
        thread.join()
    assert len(calls) == 1 and len(found) == 2
    for source in found:
        assert_same(source, straight)


def test_of_two_at_once_one_prepares(tmp_path, digits_dir, monkeypatch):
    """The other one finds the set when it is its turn."""
    made = []
    there, find = tmp_path / "digits" / "1.0.0", prepared.find
    monkeypatch.setattr(prepared, "find", lambda *args: there if made else find(*args))
    (tmp_path / "digits").mkdir()
    for name, age in (("incomplete.ABCDEF_1.0.0", 4000), ("incomplete.GHIJKL_1.0.0", 0)):
        (tmp_path / "digits" / name).mkdir()
        os.utime(tmp_path / "digits" / name, times=2 * (time.time() - age,))
    monkeypatch.setattr(prepared.tfds.core.GeneratorBasedBuilder, "download_and_prepare", lambda _: made.append(1))
    for _ in range(2):
        assert prepared.prepare("digits", tmp_path) == there
    assert len(made) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["digits", "incomplete.GHIJKL_1.0.0"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_is_said_and_nothing_is_decoded_elsewhere(
    small_parts, place, load, straight, monkeypatch, code
):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(decoded.tempfile, "TemporaryFile", None)
        patch.setattr(unfinished.os, "fsync", fail)
        words = rf"decoded-test-\w+\.npy could not be written \({os.strerror(code)}\); the decoded pictures are kept"
        with pytest.raises(OSError, match=words):
            load()
        with stopped_after(monkeypatch, 2, OSError(os.strerror(code))):
            load()
    assert_same(load(), straight)


def test_a_signal_ends_it_and_nothing_is_lost(place, load, straight, monkeypatch):
    """Also where it comes before anything was made safe."""
    monkeypatch.setattr(stored_split, "RECORDS_PER_READ", 20)
    with stopped_after(monkeypatch, 3, Preempted("SIGTERM")):
        load()
    read, numbers = stored_split.Stored._read, []
    monkeypatch.setattr(stored_split.Stored, "_read", lambda self, begin: numbers.append(begin) or read(self, begin))
    assert_same(load(), straight)
    assert numbers == [60]


def test_leftovers_of_dead_processes_are_removed_and_nothing_else(place, load):
    tmp = f"{32 * 'a'}.tmp"
    old = ["decoded-test-0000000000000000.npy." + tmp, "classes-test-0000000000000000.npy." + tmp]
    stale = [f"{name}-test-0000000000000000.npy.unfinished" for name in ("classes", "decoded")]
    stale.append(stale[1] + ".count")
    kept = ["decoded-test-1111111111111111.npy." + tmp, "decoded-train-0000000000000000.npy.unfinished"]
    taken = "decoded-test-2222222222222222.npy.unfinished"
    for name in (*old, *stale, *kept, taken):
        (place / name).write_bytes(b"")
        os.utime(place / name, times=2 * (time.time() - (0 if name in kept else 4000),))
    with files.alone(place / taken, ""):
        load()
    names = {path.name for path in place.iterdir()}
    assert names >= {*kept, taken} and not names & {*old, *stale}


def test_without_locks_a_process_decodes_for_itself(place, load, straight, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert_same(load(), straight)
    assert not [name for name in left(place) if name.endswith((".tmp", ".count"))]


def test_without_locks_two_at_once_do_not_share_the_classes(place, load, straight, small_parts, monkeypatch):
    """The second begins when the first has half of the pictures, and ends first."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    examples, begun, found = stored_split._examples, [], []

    def halfway(*args):
        first = not begun
        begun.append(args)
        for number, part in enumerate(examples(*args)):
            if first and number == 8:
                found.append(load())
            yield part

    monkeypatch.setattr(stored_split, "_examples", halfway)
    found.append(load())
    assert len(begun) == 2
    for one in found:
        assert_same(one, straight)


@pytest.mark.parametrize("error", [RuntimeError("pread() failed: Input/output error; reading a"), MemoryError()])
def test_what_is_no_damage_keeps_what_is_decoded(error, place, load, straight, small_parts, monkeypatch):
    """ArrayRecord reports a failed read as a RuntimeError."""
    examples = stored_split._examples

    def some(*args):
        for number, part in enumerate(examples(*args)):
            if number == 5:
                raise error
            yield part

    with monkeypatch.context() as patched:
        patched.setattr(stored_split, "_examples", some)
        with pytest.raises((OSError, MemoryError)) as raised:
            load()
    of_the_disk = "cannot read the test pictures of data.name='digits' (pread() failed: Input/output error; reading a)"
    assert str(raised.value) == (of_the_disk if isinstance(error, RuntimeError) else "")
    assert any(name.endswith(".count") for name in left(place))
    assert_same(load(), straight)


def test_a_picture_for_which_memory_is_missing_is_not_damaged(monkeypatch):
    monkeypatch.setattr(Resizing, "pixels", lambda *given: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        decoders.decode(Resizing(), 1, [b""])


@pytest.mark.slow
def test_several_processes_decode_the_same_in_the_same_order(place, straight):
    """A damaged picture is named; a process that is killed is one line."""
    builder = prepared.open_directory("digits", place)
    stored, numbers = prepared.records("digits", builder, "test")
    some = [numbers[begin : begin + 20] for begin in range(0, 299, 20)]
    parts = [part for chosen in some for part in stored_split._examples(builder, stored, chosen)]
    found = list(decoders.decoded(parts, Resizing(), 1, num_processes=2))
    np.testing.assert_array_equal(np.concatenate([pictures for pictures, _ in found]), straight.images())
    assert sum((labels for _, labels in found), []) == straight.classes.tolist()
    with pytest.raises(decoders.Undecodable, match="cannot identify image file"):
        list(decoders.decoded([parts[0], [(b"x", 0)]], Resizing(), 1, num_processes=2))
