"""The variational bound of every image of a split, in bits/dim: all terms, or an estimate from a few."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion import estimators, files, likelihood, parallel, randomness, report
from diffusion.build import Experiment
from diffusion.data import ImageSet
from diffusion.step import to_unit

PILOT_IMAGES = 8  # every term of so many images is computed to see which t matter


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N images: every term, or a part of each image's terms and what they say about the rest."""

    decoder_bpd: Float[np.ndarray, " n"]  # L_0
    kl_bpd: Float[np.ndarray, " n"]  # the sum over t > 1 of L_{t−1}, or an estimate of it
    prior_bpd: Float[np.ndarray, " n"]  # L_T
    decoded_mse: Float[np.ndarray, " n"]  # of x̂_0 as x_1 shows it, in squared grey levels
    sampling_stderr: float = 0.0  # of the mean over these images, because not every term was computed
    terms_bpd: Float[np.ndarray, "n t"] | None = None  # entry [n, t − 1] is image n's term of t
    x0_mse: Float[np.ndarray, "n t"] | None = None  # of x̂_0 as x_t shows it, in squared grey levels

    @property
    def image_bpd(self) -> Float[np.ndarray, " n"]:
        """Each image's whole bound."""
        return self.decoder_bpd + self.kl_bpd + self.prior_bpd

    def summary(self, split: str) -> dict[str, Any]:
        """The mean over images with its standard errors, its parts, and rate and distortion.

        Ho et al. (2020), section 4.3: the rate L_1 + … + L_T is what x_1 costs, the distortion L_0 what is then
        missing; its root mean squared error is that of x̂_0, in grey levels (0…255 for photographs).
        """
        total = self.image_bpd
        return {
            f"{split}_bpd": total.mean(),
            # Of one image there is no spread to estimate the error from.
            f"{split}_bpd_stderr": total.std(ddof=1) / len(total) ** 0.5 if len(total) > 1 else None,
            f"{split}_bpd_sampling_stderr": self.sampling_stderr,
            f"{split}_decoder_bpd": self.decoder_bpd.mean(),
            f"{split}_kl_bpd": self.kl_bpd.mean(),
            f"{split}_rate_bpd": (self.kl_bpd + self.prior_bpd).mean(),
            f"{split}_distortion_bpd": self.decoder_bpd.mean(),
            f"{split}_distortion_rmse": self.decoded_mse.mean() ** 0.5,
            f"{split}_images": len(total),
        }

    def progressive_coding(self) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """What a receiver of x_t has paid, in bits/dim, and how far its x̂_0 is off: entry t − 1 is that of t.

        The rate L_T + Σ_{s>t} L_{s−1} has bought x_T, …, x_t; the distortion is a root mean squared error in grey
        levels. Ho et al. (2020), section 4.3 and figure 5.
        """
        terms = self.terms_bpd.mean(axis=0)
        still_to_come = np.cumsum(terms)
        return self.prior_bpd.mean() + still_to_come[-1] - still_to_come, self.x0_mse.mean(axis=0) ** 0.5


class _PairScores:
    """Scores (image, t) pairs of any images and any t in batches of eval.batch_size, by one compiled program.

    A term's ε belongs to the number of the image in its split and to t, whatever is scored beside it. x̂_0 is clipped.
    """

    def __init__(self, experiment: Experiment):
        num_levels, config = experiment.num_levels, experiment.config
        seed_key = randomness.stream(config.seed, "eval")
        decoder = likelihood.PROTOCOLS[config.eval.protocol].decoder

        def one_batch(params, images, numbers, split_number, image, t):
            x0 = to_unit(images[image], num_levels)
            keys = randomness.per_item(jax.random.fold_in(seed_key, split_number), numbers[image])
            denoise, row = experiment.denoiser(params), experiment.schedule_of(params)[t]
            return likelihood.vlb_batch_bpd(denoise, experiment.p, row, x0, keys, num_levels, decoder=decoder)

        self._compiled = parallel.over_devices(one_batch)
        self._batch_size = config.eval.batch_size
        self._grey_levels = (num_levels - 1) / 2  # per unit of x

    def __call__(
        self, params: PyTree, image_set: ImageSet, numbers: np.ndarray, t: np.ndarray, name: str, scores: np.ndarray
    ) -> None:
        """Fills `scores` [2, N, terms] where it is NaN: image numbers[n] at t[n], the term and the error of x̂_0.

        The terms are bits/dim, the errors mean squares in grey levels. The array may live on disk: it is filled batch
        by batch.
        """
        terms, mse = scores.reshape(2, -1)
        missing = np.flatnonzero(np.isnan(terms))
        data = parallel.replicate((image_set.images[numbers], numbers, np.int32(image_set.split_number)))

        def store(pairs, term, x0_mse):
            # The term last: it is what says that a pair is done.
            mse[pairs] = parallel.gather(x0_mse, len(pairs)) * self._grey_levels**2
            terms[pairs] = parallel.gather(term, len(pairs))

        running = None
        with report.Progress(t.size, initial=t.size - len(missing), desc=f"score {name}", unit="term") as progress:
            for items, num_real in parallel.padded_batches(len(missing), self._batch_size) if len(missing) else ():
                pairs = missing[items]
                started = self._compiled(params, *data, pairs // t.shape[1], t.ravel()[pairs])
                if running:  # one batch is computed while the one before is fetched
                    store(*running)
                    progress.update(len(running[0]))
                running = (pairs.ravel()[:num_real], *started)
            if running:
                store(*running)
                progress.update(len(running[0]))


def bound_of(experiment: Experiment) -> Callable[..., Bound]:
    """The bound as a function of (replicated parameters, image set, numbers of the images to score), compiled once.

    Every term of every image is computed exactly once: the last batch is padded and the padding dropped. With a fourth
    argument, the path of a file, finished terms are kept there, and a call that finds some computes the others.
    """
    score, every_t = _PairScores(experiment), np.arange(1, experiment.config.schedule.num_steps + 1)

    def bound(
        replicated_params: PyTree, image_set: ImageSet, numbers: Int[np.ndarray, " n"], kept: Path | None = None
    ) -> Bound:
        shape = (2, len(numbers), len(every_t))
        scores = np.full(shape, np.nan, np.float32) if kept is None else _on_disk(kept, shape)
        score(replicated_params, image_set, numbers, np.tile(every_t, (len(numbers), 1)), image_set.split, scores)
        terms, x0_mse = np.asarray(scores, np.float64)  # for the sums to come
        kl = terms[:, 1:].sum(axis=1)
        prior = _prior(experiment, replicated_params, image_set, numbers)
        return Bound(terms[:, 0], kl, prior, x0_mse[:, 0], terms_bpd=terms, x0_mse=x0_mse)

    return bound


def estimated_bound_of(experiment: Experiment) -> Callable[[PyTree, ImageSet, np.ndarray], Bound]:
    """`bound_of` from eval.terms_per_image terms of each image: see `estimators`.

    A term is the number that the full evaluation would compute, with the same ε, so that what is estimated is
    that evaluation's result.
    """
    score, config = _PairScores(experiment), experiment.config
    seed_key = randomness.stream(config.seed, "eval")

    def at(replicated_params, image_set, numbers, t, name):
        """The terms and the squared errors of x̂_0 of images [N] at t [N, terms], each [N, terms]."""
        scores = np.full((2, *t.shape), np.nan)
        score(replicated_params, image_set, numbers, t, name, scores)
        return scores

    def bound(replicated_params: PyTree, image_set: ImageSet, numbers: Int[np.ndarray, " n"]) -> Bound:
        every_t = np.arange(1, config.schedule.num_steps + 1)
        pilot = numbers[np.linspace(0, len(numbers) - 1, min(PILOT_IMAGES, len(numbers))).astype(int)]
        pilot_t = np.tile(every_t, (len(pilot), 1))
        pilot_terms, _ = at(replicated_params, image_set, pilot, pilot_t, f"{image_set.split}, pilot")
        q = estimators.proposal(pilot_terms)
        keys = randomness.per_item(jax.random.fold_in(seed_key, image_set.split_number), jnp.asarray(numbers))
        # t = 0 has no ε, so its number is free to mean the choice of t.
        offsets = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (2,)))(keys)
        t = estimators.draw_t(q, np.asarray(offsets, np.float64), config.eval.terms_per_image)
        terms, x0_mse = at(replicated_params, image_set, numbers, t, image_set.split)
        estimate = estimators.estimate(terms, t, q)
        prior = _prior(experiment, replicated_params, image_set, numbers)
        return Bound(estimate.decoder_bpd, estimate.kl_bpd, prior, x0_mse[:, 0], estimate.sampling_stderr)

    return bound


def _prior(
    experiment: Experiment, replicated_params: PyTree, image_set: ImageSet, numbers: np.ndarray
) -> Float[np.ndarray, " n"]:
    """L_T of every image, which needs no network."""
    schedule = experiment.schedule_of(parallel.unreplicate(replicated_params))
    prior = jax.vmap(lambda image: likelihood.prior_bpd(schedule, to_unit(image, experiment.num_levels)))
    return np.asarray(jax.jit(prior)(image_set.images[numbers]), np.float64)


def _on_disk(path: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """An array of float32 that lives in a file and outlives the process; NaN at first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            np.save(file, np.full(shape, np.nan, np.float32))
    return np.load(path, mmap_mode="r+")
