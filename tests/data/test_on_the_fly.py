"""Pictures that are decoded on demand: the same pixel values, batches, digests and splits."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from PIL import PngImagePlugin

from diffusion import data
from diffusion.data import encoded, index, resizing, stored_split, validation
from diffusion.data import source as source_lib
from diffusion.data.folder import decoding
from diffusion.experiment import build
from diffusion.runtime import files
from diffusion.training import parallel


def load(directory, decode="on_the_fly", split="test", name="digits", **fit):
    return data.load(name, split, str(directory), decode=decode, **fit)


@pytest.fixture(scope="module")
def both(digits_dir):
    """(decoded ahead, decoded on the fly)."""
    return load(digits_dir, "ahead"), load(digits_dir)


def batches(source, steps, seed=3):
    """What each of these steps takes, on the devices; a batch spans several epochs now and then."""
    place = parallel.streamed(source, conditional=True)
    return [place(data.batch_indices(seed, step, 16 * jax.device_count(), len(source))[None]) for step in steps]


def assert_equal(first, *others):
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


# --- the same data


def test_batches_are_equal_bit_by_bit_also_from_the_middle_on_and_of_each_process(both, digits_dir, monkeypatch):
    ahead, on_the_fly = both
    assert isinstance(on_the_fly.pixels, encoded.Encoded) and not isinstance(ahead.pixels, encoded.Encoded)
    assert_equal(*(batches(source, range(1, 5)) for source in both))
    assert_equal(batches(ahead, range(3, 5)), batches(load(digits_dir), range(3, 5)))
    shares = []
    monkeypatch.setattr(jax, "device_count", lambda: 16)  # of two processes with eight devices each
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(batches(on_the_fly, [5]))
        assert_equal(batches(ahead, [5]), shares[-1])
    assert (np.asarray(shares[0][0].images) != np.asarray(shares[1][0].images)).any()


def test_examples_are_taken_as_from_an_array(both):
    ahead, on_the_fly = both
    for indices in (np.array([[7, 0, 7], [-1, 3, 0]]), np.array([], int), slice(None), slice(290, None), slice(0, 0)):
        np.testing.assert_array_equal(on_the_fly.images(indices), ahead.images(indices))
    np.testing.assert_array_equal(on_the_fly.labels(), ahead.labels())
    assert (len(on_the_fly), on_the_fly.image_shape, on_the_fly.num_classes) == (299, (8, 8, 1), 10)
    with pytest.raises(IndexError):
        on_the_fly.images(np.array([299]))


@pytest.mark.parametrize("fit", [{"image_size": 4}, {"image_size": 5, "pad_to": 8}])
def test_sizes_held_out_examples_and_sets_without_labels(tmp_path, write_foreign, fit):
    write_foreign((None, None, 3), sizes=[(8, 8), (12, 9), (20, 33)] * 10, splits=("train",))
    for split in ("train", "test"):
        ahead, on_the_fly = (load(tmp_path, decode, split, "foreign", **fit) for decode in ("ahead", "on_the_fly"))
        np.testing.assert_array_equal(on_the_fly.images(np.arange(len(ahead))), ahead.images())
        assert on_the_fly.sha256() == ahead.sha256() and on_the_fly.classes is None


@pytest.mark.parametrize("wanted", [50, validation.A_TENTH])
def test_the_digest_and_the_validation_images_are_the_same_and_nothing_is_decoded_for_them(both, wanted, monkeypatch):
    ahead, on_the_fly = both
    expected = [(source.chosen, source.sha256()) for source in validation.split_off(ahead, wanted)]
    monkeypatch.setattr(encoded.Encoded, "__getitem__", None)
    assert_equal([(source.chosen, source.sha256()) for source in validation.split_off(on_the_fly, wanted)], expected)


def test_other_labels_have_another_digest(both):
    ahead, on_the_fly = (dataclasses.replace(source, classes=source.classes[::-1]) for source in both)
    assert ahead.sha256() == on_the_fly.sha256() != both[1].sha256()


def test_a_picture_that_is_asked_for_often_is_decoded_once(both):
    calls, pixels = [], both[1].pixels
    counted = dataclasses.replace(pixels, picture=lambda number: calls.append(number) or pixels.picture(number))
    np.testing.assert_array_equal(counted[np.array([5, 9, 5, 5])], pixels[np.array([5, 9])][[0, 1, 0, 0]])
    assert sorted(calls) == [5, 9]


# --- the index


def test_the_pass_over_all_pictures_is_made_once(digits_copy, monkeypatch):
    first = load(digits_copy)
    assert not list(digits_copy.rglob("decoded-*")) and not list(digits_copy.rglob("*.unfinished"))
    monkeypatch.setattr(stored_split, "_examples", None)
    assert load(digits_copy).sha256() == first.sha256()


@pytest.mark.parametrize("damage", [b"", None])
def test_a_damaged_index_is_made_again(digits_copy, damage):
    expected = load(digits_copy).sha256()
    (path,) = digits_copy.rglob("index-test-*.npz")
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert load(digits_copy).sha256() == expected


def test_an_index_of_another_decoder_is_made_again(digits_copy, monkeypatch):
    """Its digests would not be those of the pixel values that are trained on."""
    before = load(digits_copy).sha256()
    pixels = resizing.Resizing.pixels
    monkeypatch.setattr(resizing.Resizing, "pixels", lambda *given: np.minimum(pixels(*given), 15))
    other = load(digits_copy)
    other = dataclasses.replace(other, pixels=other.images())
    assert load(digits_copy).sha256() == other.sha256() != before


def test_of_two_at_once_one_makes_the_index(digits_copy, monkeypatch, caplog):
    calls, found, make = [], [], index._of
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.01)

    def slow(stored):
        calls.append(stored)
        while len(calls) < 2 and "waiting for another process, which reads digits test once" not in caplog.text:
            threading.Event().wait(0.01)
        return make(stored)

    monkeypatch.setattr(index, "_of", slow)
    threads = [threading.Thread(target=lambda: found.append(load(digits_copy).sha256())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(found)) == 1


@pytest.mark.parametrize("is_cache_writable", [True, False])
def test_beside_a_read_only_set_the_index_goes_to_the_cache(
    digits_copy, own_cache, is_cache_writable, monkeypatch, caplog
):
    expected, alone = load(digits_copy, "ahead").sha256(), files.alone

    def refuse(path, waiting):
        if path.is_relative_to(digits_copy) or not is_cache_writable:
            raise PermissionError(13, "Permission denied")
        return alone(path, waiting)

    monkeypatch.setattr(files, "alone", refuse)
    assert load(digits_copy).sha256() == expected
    assert len(list(own_cache.rglob("index-test-*.npz"))) == is_cache_writable
    assert ("no index of digits test can be kept in" in caplog.text) != is_cache_writable


# --- when, and what is said


def test_by_itself_it_is_for_large_splits_without_decoded_pictures(digits_copy, monkeypatch, caplog):
    def is_encoded(split):
        return isinstance(load(digits_copy, "auto", split).pixels, encoded.Encoded)

    monkeypatch.setattr(source_lib, "AHEAD_BYTES", 298 * 64)
    assert is_encoded("test")
    assert "take 0 GiB, more than 0, so its pictures are decoded on the fly; data.decode=ahead keeps" in caplog.text
    load(digits_copy, "ahead")
    assert not is_encoded("test")
    caplog.clear()
    monkeypatch.setattr(source_lib, "AHEAD_BYTES", 1498 * 64)
    assert not is_encoded("train") and not caplog.records


def test_the_key_decides(tiny):
    splits = {
        decode: build.load_splits(tiny(data__decode=decode, data__validation=100)) for decode in source_lib.DECODE
    }
    for decode, found in splits.items():
        assert all(isinstance(source.pixels, encoded.Encoded) == (decode == "on_the_fly") for source in found)
        assert found.sha256() == splits["ahead"].sha256()
    assert_equal(*(found.validation.images(np.arange(9)) for found in splits.values()))


def test_damage_and_errors_of_the_disk_are_one_line(digits_copy, monkeypatch):
    source = load(digits_copy)
    monkeypatch.setattr(stored_split, "_parse", lambda parser, record: {"image": record[:9]})
    with pytest.raises(ValueError, match="cannot decode the test pictures of data.name='digits' .* again$"):
        source.images(np.arange(3))

    def fail(parser, record):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stored_split, "_parse", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source.images(np.arange(3))


def test_many_record_files_may_be_open(monkeypatch):
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(files.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(files.resource, "setrlimit", lambda _, now: limits.update(now=now))
    files.allow_open(500)
    assert limits["now"] == (1024, 4096)
    files.allow_open(1024)
    assert limits["now"] == (1536, 4096)
    with pytest.raises(OSError, match="^9,000 files must be open at a time, but a process may open 4,096"):
        files.allow_open(9000)


# --- threads


def test_pillow_s_limits_stay_raised_until_the_last_thread_has_closed_its_picture(tmp_path):
    before, (first, second) = PngImagePlugin.MAX_TEXT_CHUNK, (decoding.opened(tmp_path / "x.png") for _ in range(2))
    decoding.Image.new("L", (1, 1)).save(tmp_path / "x.png")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert PngImagePlugin.MAX_TEXT_CHUNK == decoding.MAX_METADATA_BYTES
    second.__exit__(None, None, None)
    assert PngImagePlugin.MAX_TEXT_CHUNK == before


def test_a_thread_leaves_the_warnings_of_others_alone():
    found = []

    def look():
        with decoding._without_warnings():
            found.append(decoding.warnings.filters[:])

    before = decoding.warnings.filters[:]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
