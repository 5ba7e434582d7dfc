"""The reference: computed once, computed again if damaged, and read from other people's files."""

import logging

import numpy as np
import pytest

from diffusion.evaluation import quality, reference
from diffusion.evaluation.quality import Batch
from diffusion.evaluation.reference import Reference
from diffusion.runtime import files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusion" / "references"


@pytest.fixture
def made():
    """How often `make` was called."""
    return []


@pytest.fixture
def make(made):
    def reference():
        made.append(1)
        rng = np.random.default_rng(0)
        states = quality.states([Batch(rng.standard_normal((60, 3)), rng.standard_normal((60, 2)))])
        scale = {"frechet_distance_test_split": 0.5, "kid_test_split": None}
        return Reference(states, scale, np.ones((4, 3), np.float32))

    return reference


def results(found):
    generated = quality.states([Batch(np.random.default_rng(1).standard_normal((70, 3)))])
    return quality.results(generated, found.states)


def test_it_is_computed_once_for_all_that_it_depends_on(make, made):
    first = reference.cached({"data": "a"}, 3, make)
    again = reference.cached({"data": "a"}, 3, make)
    assert len(made) == 1 and again.scale == first.scale and np.array_equal(again.others, first.others)
    assert results(again) == results(first)
    for update, state in first.states.items():
        assert type(again.states[update]) is type(state)
    reference.cached({"data": "b"}, 3, make)
    assert len(made) == 2


def test_another_table_of_metrics_is_another_reference(make, made, monkeypatch):
    reference.cached({}, 3, make)
    monkeypatch.delitem(quality.METRICS, "precision_recall")
    reference.cached({}, 3, make)
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_one_is_computed_again(make, made, cache, damage, caplog):
    first = reference.cached({}, 3, make)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert results(reference.cached({}, 3, make)) == results(first)
    assert len(made) == 2 and f"{path} is damaged" in caplog.text
    reference.cached({}, 3, make)
    assert len(made) == 2


def test_a_disk_error_is_no_damage(make, made, cache, monkeypatch):
    reference.cached({}, 3, make)

    def broken(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", broken)
    with pytest.raises(OSError, match="Input/output error"):
        reference.cached({}, 3, make)
    assert len(made) == 1


def test_where_it_cannot_be_written_it_is_used_all_the_same(make, monkeypatch, caplog):
    def full(path):
        raise OSError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(files, "replacing", full)
    with caplog.at_level(logging.WARNING):
        assert reference.cached({}, 3, make).scale["frechet_distance_test_split"] == 0.5
    assert "(No space left on device); it will be computed again" in caplog.text


def test_others_mean_and_covariance_give_the_frechet_distance_alone(make, tmp_path):
    mean, cov = np.array([1.0, 0, 0]), np.diag([1.0, 2, 3])
    np.savez(tmp_path / "stats.npz", mu=mean.astype(np.float32), sigma=cov)
    generated = quality.states([Batch(np.random.default_rng(1).standard_normal((70, 3)))])
    found = quality.results(generated, reference.published(tmp_path / "stats.npz", 3))
    moments = generated[quality.see].moments
    assert found["frechet_distance"] == pytest.approx(quality.frechet_distance(moments.mean, moments.cov, mean, cov))
    assert found["frechet_infinity"] is not None
    assert found["kid"] is found["kid_std"] is found["precision"] is found["recall"] is None


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FileNotFoundError, match="quality.reference='.*stats.npz' does not exist"):
        reference.published(path, 3)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"has mu \[2\] and sigma \[2, 2\], but quality.features gives 3 numbers"):
        reference.published(path, 3)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        reference.published(path, 3)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ValueError, match="is no .npz file with mu and sigma"):
        reference.published(path, 3)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no .npz file with mu and sigma"):
        reference.published(path, 3)
