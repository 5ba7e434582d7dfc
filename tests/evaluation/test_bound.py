"""The bound of a split: each term of each image once, also after an interruption, and estimates of the same sum."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood
from diffusion.data.levels import to_unit
from diffusion.evaluation.bound import Bound, Settings, estimated_bound, full_bound
from diffusion.runtime import devices, randomness

NUMBERS = np.arange(3, 14)


@pytest.fixture(scope="module")
def replicated(model):
    return devices.replicate(model)


@pytest.fixture(scope="module")
def full(replicated, source):
    """11 images in batches of 16 pairs on 8 devices, the last one padded."""
    return full_bound(Settings(seed=0, batch_size=16))(replicated, source, NUMBERS)


def own_terms(model, source, numbers, **settings):
    """Each image's terms and errors by the likelihood's own scan, with the key of its number in the split."""
    key = jax.random.fold_in(randomness.stream(0, "eval"), source.split_number)
    keys = randomness.per_item(key, jnp.asarray(numbers))
    x0 = to_unit(jnp.asarray(source.images(numbers)), source.num_levels)
    terms, x0_mse = likelihood.vlb_terms_bpd(
        model.denoise, model.p, model.schedule, x0, keys, num_levels=source.num_levels, **settings
    )
    return terms, x0_mse, jax.vmap(lambda image: likelihood.prior_bpd(model.schedule, image))(x0)


def test_it_is_the_likelihood_s_bound_of_every_image(model, source, full):
    terms, x0_mse, prior = own_terms(model, source, NUMBERS)
    np.testing.assert_allclose(full.terms_bpd, terms, rtol=1e-5)
    np.testing.assert_allclose(full.prior_bpd, prior, rtol=1e-5)
    np.testing.assert_allclose(full.decoder_bpd, terms[:, 0], rtol=1e-5)
    np.testing.assert_allclose(full.image_bpd, np.asarray(terms, np.float64).sum(axis=1) + prior, rtol=1e-5)
    # 17 values in [-1, 1] lie 1/8 apart.
    np.testing.assert_allclose(full.x0_mse, 64 * x0_mse, rtol=1e-5)
    np.testing.assert_allclose(full.decoded_mse, 64 * x0_mse[:, 0], rtol=1e-5)
    assert full.sampling_stderr == 0


def test_the_classes_means_are_over_their_own_images(full):
    labels = np.array([0, 3, 0, 3, 3, 1, 0, 0, 3, 1, 0], np.int32)
    zero, one, two, three = full.bpd_by_class(labels, 4)
    bpd = full.image_bpd
    assert zero == pytest.approx((bpd[0] + bpd[2] + bpd[6] + bpd[7] + bpd[10]) / 5)
    assert one == pytest.approx((bpd[5] + bpd[9]) / 2) and three == pytest.approx((bpd[[1, 3, 4, 8]]).mean())
    assert two is None


def test_a_protocol_decides_on_the_decoder(model, source, replicated):
    published = full_bound(Settings(seed=0, batch_size=64, protocol="ho2020"))(replicated, source, NUMBERS)
    terms, _, _ = own_terms(model, source, NUMBERS, decoder=likelihood.PROTOCOLS["ho2020"].decoder)
    np.testing.assert_allclose(published.terms_bpd, terms, rtol=1e-5)


def test_an_image_keeps_its_noise_in_other_batches_and_has_another_in_the_other_split(replicated, source, full):
    bound = full_bound(Settings(seed=0, batch_size=8))
    again = bound(replicated, source, NUMBERS[3:])
    np.testing.assert_allclose(again.image_bpd, full.image_bpd[3:], rtol=1e-5)
    other_split = bound(replicated, dataclasses.replace(source, split="train"), NUMBERS[3:])
    assert not np.allclose(other_split.image_bpd, again.image_bpd, rtol=1e-3)


def test_one_program_serves_all_parameters(replicated, source, full):
    """A bound is made once, and called with any replicated model."""
    bound = full_bound(Settings(seed=0, batch_size=16))
    moved = jax.tree.map(lambda leaf: leaf, replicated.host())
    moved.denoise.args[0]["scale"] = np.float32(0.2)
    first, second = (bound(shared, source, NUMBERS) for shared in (replicated, devices.replicate(moved)))
    np.testing.assert_array_equal(first.terms_bpd, full.terms_bpd)
    assert not np.allclose(second.terms_bpd, full.terms_bpd, rtol=1e-3)
    np.testing.assert_array_equal(second.prior_bpd, full.prior_bpd)


def test_a_bound_that_was_cut_computes_what_is_missing(replicated, source, full, tmp_path):
    """Finished terms are read from the file and not computed again; the others come out as without a file."""
    bound, kept = full_bound(Settings(seed=0, batch_size=16)), tmp_path / "kept" / "test.npy"
    np.testing.assert_array_equal(bound(replicated, source, NUMBERS, kept).terms_bpd, full.terms_bpd)
    terms = np.load(kept, mmap_mode="r+")
    terms[0, :3], terms[0, 3:] = 7.0, np.nan
    terms.flush()
    again = bound(replicated, source, NUMBERS, kept).terms_bpd
    np.testing.assert_array_equal(again[:3], 7.0)
    np.testing.assert_allclose(again[3:], full.terms_bpd[3:], rtol=1e-5)


def test_an_estimate_that_is_cut_after_any_batch_ends_with_the_same_bits(replicated, source, tmp_path):
    """Each call is stopped after one more batch, in the pilot and after it; nothing is measured twice."""
    settings, calls = Settings(seed=0, batch_size=16, terms_per_image=3), []

    def stop():
        calls.append(None)
        raise InterruptedError

    straight = estimated_bound(settings)(replicated, source, NUMBERS)
    bound = estimated_bound(settings, stop)
    for _ in range(10):
        with contextlib.suppress(InterruptedError):
            resumed = bound(replicated, source, NUMBERS, tmp_path / "test.npy")
            break
    # 8 images × 6 terms in the pilot, 11 × 3 after it, 16 at a time.
    assert len(calls) == 3 + 3
    for field in ("decoder_bpd", "kl_bpd", "prior_bpd", "decoded_mse", "sampling_stderr"):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(straight, field), err_msg=field)


def test_several_noises_are_averaged_and_the_first_is_that_of_a_single_one(model, replicated, source, full, tmp_path):
    """Draw 1 and 2 have keys of their own; each draw has a file, and the errors are those of independent draws."""
    settings = Settings(seed=0, batch_size=64, noises_per_term=3)
    several = full_bound(settings)(replicated, source, NUMBERS, tmp_path / "test.npy")
    key = jax.random.fold_in(randomness.stream(0, "noises"), source.split_number)
    x0, draws = to_unit(jnp.asarray(source.images(NUMBERS)), source.num_levels), [full.terms_bpd]
    for draw in (1, 2):
        of_draw = jax.vmap(jax.random.fold_in, in_axes=(0, None))(randomness.per_item(key, jnp.asarray(NUMBERS)), draw)
        given = model.denoise, model.p, model.schedule, x0, of_draw
        draws.append(np.asarray(likelihood.vlb_terms_bpd(*given, num_levels=source.num_levels)[0], np.float64))
        np.testing.assert_allclose(np.load(tmp_path / f"test_noise{draw}.npy")[0], draws[-1], rtol=1e-5)
    np.testing.assert_allclose(several.terms_bpd, np.mean(draws, axis=0), rtol=1e-5)
    total = np.sum(draws, axis=2).var(axis=0, ddof=1)
    np.testing.assert_allclose(several.noise_stderr, (total / 3).sum() ** 0.5 / 11, rtol=1e-4)
    of_terms = (np.var(draws, axis=0, ddof=1) / 3).sum(axis=0) ** 0.5 / 11
    np.testing.assert_allclose(several.terms_noise_stderr, of_terms, rtol=1e-3)
    assert several.summary("test")["test_bpd_noise_stderr"] == several.noise_stderr
    assert not any("noise" in name for name in full.summary("test"))


def test_the_estimate_is_of_the_full_evaluation(replicated, source):
    """From the same terms: the decoder's are equal, the sum of the others has the error that is stated."""
    numbers, settings = np.arange(30), Settings(seed=0, batch_size=64, terms_per_image=3)
    full = full_bound(settings)(replicated, source, numbers)
    estimate = estimated_bound(settings)(replicated, source, numbers)
    np.testing.assert_allclose(estimate.decoder_bpd, full.decoder_bpd, rtol=1e-5)
    np.testing.assert_allclose(estimate.decoded_mse, full.decoded_mse, rtol=1e-5)
    np.testing.assert_allclose(estimate.prior_bpd, full.prior_bpd, rtol=1e-5)
    assert 0 < estimate.sampling_stderr < 0.2 * full.kl_bpd.mean()
    assert abs(estimate.image_bpd.mean() - full.image_bpd.mean()) < 3 * estimate.sampling_stderr
    assert estimate.terms_bpd is None


TERMS = np.array([[1.0, 0.5, 0.25], [3.0, 1.5, 0.75]])
BOUND = Bound(
    decoder_bpd=TERMS[:, 0],
    kl_bpd=TERMS[:, 1:].sum(axis=1),
    prior_bpd=np.array([0.125, 0.375]),
    decoded_mse=np.array([4.0, 12.0]),
    terms_bpd=TERMS,
    x0_mse=np.array([[4.0, 9.0, 16.0], [12.0, 9.0, 48.0]]),
)


def test_the_summary_is_means_over_images_with_the_standard_error_of_their_sum():
    summary = BOUND.summary("test")
    assert summary == {
        "test_bpd": 3.75, "test_bpd_stderr": pytest.approx(np.std([1.875, 5.625], ddof=1) / 2**0.5),
        "test_bpd_sampling_stderr": 0.0, "test_decoder_bpd": 2.0, "test_kl_bpd": 1.5, "test_rate_bpd": 1.75,
        "test_distortion_bpd": 2.0, "test_distortion_rmse": pytest.approx(8**0.5), "test_images": 2,
    }  # fmt: skip
    assert summary["test_bpd"] == summary["test_rate_bpd"] + summary["test_distortion_bpd"]
    one = Bound(*(np.ones(1) for _ in range(4))).summary("train")
    assert one["train_bpd"] == 3.0 and one["train_bpd_stderr"] is None


def test_progressive_coding_pays_from_the_noise_to_the_image():
    """Ho et al. (2020), section 4.3: x_t costs the prior and the terms above t; x_1 has cost all but the decoder's."""
    rate, rmse = BOUND.progressive_coding()
    np.testing.assert_allclose(rate, [0.25 + 1.0 + 0.5, 0.25 + 0.5, 0.25])
    np.testing.assert_allclose(rmse, [8**0.5, 3.0, 32**0.5])
    assert rate[0] == BOUND.summary("test")["test_rate_bpd"]
