"""The variational bound of every image of a split, in bits/dim: from all terms, or estimated from a few."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PyTree, Real

from diffusion import continuous_time, guidance, likelihood
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.evaluation import estimators
from diffusion.evaluation.kept import on_disk
from diffusion.evaluation.pairs import ImagePairs, ImageTimePairs, every_t
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.runtime import processes, randomness
from diffusion.runtime.devices import Replicated

NOISES = "noises"  # the stream of a term's second and later ε
PILOT_IMAGES = 8  # every term of so many images is computed to see which t matter
PRIOR_IMAGES = 1000  # whose prior terms are computed at a time: as float32, images are four times as large


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N images: every term, or some terms of each image and an estimate of the rest."""

    decoder_bpd: Float[np.ndarray, " n"]  # L_0
    kl_bpd: Float[np.ndarray, " n"]  # the sum over t > 1 of L_{t−1}, or an estimate of it
    prior_bpd: Float[np.ndarray, " n"]  # L_T
    decoded_mse: Float[np.ndarray, " n"]  # of x̂_0 as x_1 shows it, in squared pixel values
    sampling_stderr: float = 0.0  # of the mean over these images, because not every term was computed
    terms_bpd: Float[np.ndarray, "n t"] | None = None  # entry [n, t − 1] is image n's term of t
    x0_mse: Float[np.ndarray, "n t"] | None = None  # of x̂_0 as x_t shows it, in squared pixel values
    # Of the mean over these images, and of each t's: what other ε would change. None where a term has a single ε.
    noise_stderr: float | None = None
    terms_noise_stderr: Float[np.ndarray, " t"] | None = None

    @property
    def image_bpd(self) -> Float[np.ndarray, " n"]:
        """Each image's full bound: the sum of its parts."""
        return self.decoder_bpd + self.kl_bpd + self.prior_bpd

    def summary(self, split: str) -> dict[str, Any]:
        """The mean over images with its standard errors, its parts, and the rate and distortion.

        Ho et al. (2020), section 4.3: the rate L_1 + … + L_T is the cost of x_1, and the distortion L_0 is the rest.
        The root mean squared error is that of x̂_0, in pixel values (0…255 for photographs).
        """
        total = self.image_bpd
        return {
            f"{split}_bpd": total.mean(),
            # Of one image there is no spread to estimate the error from.
            f"{split}_bpd_stderr": total.std(ddof=1) / len(total) ** 0.5 if len(total) > 1 else None,
            f"{split}_bpd_sampling_stderr": self.sampling_stderr,
            **({} if self.noise_stderr is None else {f"{split}_bpd_noise_stderr": self.noise_stderr}),
            f"{split}_decoder_bpd": self.decoder_bpd.mean(),
            f"{split}_kl_bpd": self.kl_bpd.mean(),
            f"{split}_rate_bpd": (self.kl_bpd + self.prior_bpd).mean(),
            f"{split}_distortion_bpd": self.decoder_bpd.mean(),
            f"{split}_distortion_rmse": self.decoded_mse.mean() ** 0.5,
            f"{split}_images": len(total),
        }

    def bpd_by_class(self, labels: Int32[np.ndarray, " n"], num_classes: int) -> list[float | None]:
        """The mean over the images of each class; None for a class without images here."""
        of_class = [self.image_bpd[labels == number] for number in range(num_classes)]
        return [bpd.mean() if len(bpd) else None for bpd in of_class]

    def progressive_coding(self) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """The bits/dim that a receiver of x_t has paid, and the error of its x̂_0. Entry t − 1 belongs to t.

        The rate L_T + Σ_{s>t} L_{s−1} is the cost of x_T, …, x_t. The distortion is a root mean squared error in pixel
        values. Ho et al. (2020), section 4.3 and figure 5.
        """
        terms = self.terms_bpd.mean(axis=0)
        still_to_come = np.cumsum(terms)
        return self.prior_bpd.mean() + still_to_come[-1] - still_to_come, self.x0_mse.mean(axis=0) ** 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the bound's measurement, apart from the model. See the config group `eval`."""

    seed: int
    batch_size: int  # pairs of image and t at a time, over all devices
    protocol: str = "exact"  # one of `likelihood.PROTOCOLS`
    terms_per_image: int = 0  # 0: all; fewer: an odd number, for an estimate
    noises_per_term: int = 1  # ε of each term, where all are computed


def full_bound(settings: Settings, stop: Callable[[], None] | None = None) -> Callable[..., Bound]:
    """The bound as a function of (replicated model, source, numbers of the images to score), compiled once.

    Every term of every image is computed exactly once: the last batch is padded and the padding dropped. The fourth
    argument is optional, the path of a file. Process 0 then keeps finished terms there, a later call computes only the
    others, and the result is complete on process 0 alone. `stop` is called after each batch and may raise.

    With several ε, a term is the mean over them. The first ε is the one that a single draw would use.
    """
    pairs, more = term_pairs(settings, stop), _pairs_of_other_noise(settings, stop)

    def bound(model: Replicated, source: Source, numbers: Int[np.ndarray, " n"], kept: Path | None = None) -> Bound:
        t, scale = every_t(len(numbers), num_steps(model)), _squared_levels(source.num_levels)
        found = measured(pairs, model, source, numbers, t, kept, f"score {source.split}", scale)
        draws = Draws(np.asarray(found, np.float64))  # for the sums to come
        for draw in range(1, settings.noises_per_term):
            values, file = t + draw * (t.shape[1] + 1), kept and kept.with_stem(f"{kept.stem}_noise{draw}")
            draws.add(measured(more, model, source, numbers, values, file, f"score {source.split}, {draw}", scale))
        terms_bpd, x0_mse = draws.mean
        prior = _prior(model, source, numbers)
        kl, errors = terms_bpd[:, 1:].sum(axis=1), draws.errors()
        return Bound(terms_bpd[:, 0], kl, prior, x0_mse[:, 0], 0.0, terms_bpd, x0_mse, *errors)

    return bound


class Draws:
    """Running sums over draws of ε: of the terms and of the errors of x̂_0 [2, n, t]."""

    def __init__(self, first: Float[np.ndarray, "2 n t"]):
        self._first, self._count = first, 1
        # Of the differences to the first draw, so that nothing cancels.
        self._sum, self._squares = 0.0, 0.0
        self._totals = [first[0].sum(axis=1)]

    def add(self, draw: Float[np.ndarray, "2 n t"]) -> None:
        difference = draw.astype(np.float64) - self._first
        self._sum = self._sum + difference
        self._squares = self._squares + difference[0] ** 2
        self._totals.append(draw[0].sum(axis=1, dtype=np.float64))
        self._count += 1

    @property
    def mean(self) -> Float[np.ndarray, "2 n t"]:
        return self._first if self._count == 1 else self._first + self._sum / self._count

    def errors(self) -> tuple[float | None, Float[np.ndarray, " t"] | None]:
        """The standard error over draws of the images' mean, for the sum over t and for each t; None for one draw."""
        if self._count == 1:
            return None, None
        num_images = self._first.shape[1]
        of_terms = (self._squares - self._sum[0] ** 2 / self._count) / (self._count - 1)
        of_total = np.var(self._totals, axis=0, ddof=1)
        total, terms = (np.sqrt(of.sum(axis=0) / self._count) / num_images for of in (of_total, of_terms))
        return float(total), terms


def estimated_bound(settings: Settings, stop: Callable[[], None] | None = None) -> Callable[..., Bound]:
    """`full_bound` from a few terms of each image: see `estimators`. It takes the same arguments and keeps the same
    files.

    Each term equals the one of the full evaluation, with the same ε. So the estimate is one of that evaluation's
    result. The pilot's terms are kept in a file of their own, beside the given path.
    """
    pairs = term_pairs(settings, stop)

    def bound(model: Replicated, source: Source, numbers: Int[np.ndarray, " n"], kept: Path | None = None) -> Bound:
        pilot = numbers[np.linspace(0, len(numbers) - 1, min(PILOT_IMAGES, len(numbers))).astype(int)]
        pilot_t, pilot_kept = every_t(len(pilot), num_steps(model)), kept and kept.with_stem(f"{kept.stem}_pilot")
        found = measured(pairs, model, source, pilot, pilot_t, pilot_kept, f"score {source.split}, pilot")
        # Process 0 alone has the terms of an earlier call, and all have to draw the same t.
        q = processes.from_first(estimators.proposal(found[0]))
        t = estimators.draw_t(q, offsets(settings.seed, source, numbers), settings.terms_per_image)
        found = measured(pairs, model, source, numbers, t, kept, f"score {source.split}")
        terms_bpd, x0_mse = np.asarray(found, np.float64)
        estimate = estimators.estimate(terms_bpd, t, q)
        decoded_mse = x0_mse[:, 0] * _squared_levels(source.num_levels)
        prior = _prior(model, source, numbers)
        return Bound(estimate.decoder_bpd, estimate.kl_bpd, prior, decoded_mse, estimate.sampling_stderr)

    return bound


def measured(
    pairs: ImagePairs,
    model: Replicated,
    source: Source,
    numbers: Int[np.ndarray, " n"],
    values: Real[np.ndarray, "n k"],
    kept: Path | None,
    desc: str,
    scale: float = 1.0,
) -> Float[np.ndarray, "2 n k"]:
    """The terms and the errors of these pairs. Pairs on disk are not measured again.

    Args:
        kept: the file in which process 0 keeps them. With it, only process 0 has the full result; other processes have
            NaN for pairs that were on disk.
        scale: the scale of the errors.
    """
    shape = (2, *values.shape)
    is_kept = kept is not None and processes.is_first()
    scores = on_disk(kept, shape) if is_kept else np.full(shape, np.nan, np.float32)
    terms, mse = scores.reshape(2, -1)
    is_done = processes.from_first(~np.isnan(terms))
    for done, (term, x0_mse) in pairs.some(model, source, numbers, values, desc, is_done):
        # The term last: it is what says that a pair is done.
        is_new = ~is_done[done]
        mse[done[is_new]] = x0_mse[is_new] * scale
        terms[done[is_new]] = term[is_new]
    return scores


def term_pairs(settings: Settings, stop: Callable[[], None] | None) -> ImageTimePairs:
    """The bound's terms and the errors of x̂_0, as the protocol defines them."""
    return ImageTimePairs(_measure_of(settings), settings.seed, settings.batch_size, stop=stop)


def _pairs_of_other_noise(settings: Settings, stop: Callable[[], None] | None) -> ImagePairs:
    """`term_pairs` with the ε of draw 1, 2, …: the value of t in draw d is t + d (T + 1)."""
    measure_of = _measure_of(settings)

    def measure(model: Model, labels: Array | None, x0: Array, keys: Array, values: Array) -> PyTree:
        draw, t = jnp.divmod(values, model.schedule.num_steps + 1)
        keys = jax.vmap(jax.random.fold_in)(keys, draw)
        denoise = guidance.conditional(model.denoise, labels) if model.takes_labels else model.denoise
        return likelihood.at_one_t(denoise, model.schedule[t], x0, keys, measure_of(model))

    return ImagePairs(measure, settings.seed, settings.batch_size, NOISES, stop)


def _measure_of(settings: Settings) -> Callable[[Model], Measure]:
    protocol = likelihood.PROTOCOLS[settings.protocol]

    def measure_of(model: Model) -> Measure:
        if protocol.kl_terms:
            return continuous_time.term_and_x0_mse(model.p, model.num_levels, protocol.clip_x0)
        return likelihood.term_and_x0_mse(model.p, model.num_levels, protocol.clip_x0, protocol.decoder)

    return measure_of


def offsets(seed: int, source: Source, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Two uniform numbers in [0, 1) for each image, at which its samples of t begin."""
    keys = jax.random.fold_in(randomness.stream(seed, "eval"), source.split_number)
    keys = randomness.per_item(keys, jnp.asarray(numbers))
    drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, randomness.NO_T), (2,)))(keys)
    return np.asarray(drawn, np.float64)


def num_steps(model: Replicated) -> int:
    """T of a replicated model."""
    return model.part(lambda model: model.schedule.t).host().shape[0] - 1


def _squared_levels(num_levels: int) -> float:
    """The factor from squared errors of data in [-1, 1] to squared pixel values."""
    return ((num_levels - 1) / 2) ** 2


def _prior(model: Replicated, source: Source, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """L_T of every image, which needs no network."""
    schedule = model.part(lambda model: model.schedule).host()

    def prior(image: Array) -> Array:
        return likelihood.prior_bpd(schedule, to_unit(image, source.num_levels))

    of_images = jax.jit(jax.vmap(prior))
    parts = [numbers[begin : begin + PRIOR_IMAGES] for begin in range(0, len(numbers), PRIOR_IMAGES)]
    return np.concatenate([np.asarray(of_images(source.images(part)), np.float64) for part in parts])
