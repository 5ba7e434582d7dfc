"""The variational bound of every image of a split, in bits/dim: all terms, or an estimate from a few."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion import estimators, likelihood, parallel, randomness, report
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


def bound_of(experiment: Experiment) -> Callable[[PyTree, ImageSet, np.ndarray], Bound]:
    """The bound as a function of (replicated parameters, image set, numbers of the images to score), compiled once.

    Every image is scored exactly once: the last batch is padded and the padding dropped. An image's noise belongs to
    its number in its split, whichever others are scored. x̂_0 is clipped.
    """
    num_levels = experiment.num_levels
    seed_key = randomness.stream(experiment.config.seed, "eval")
    decoder = likelihood.PROTOCOLS[experiment.config.eval.protocol].decoder

    def one_batch(params, images, image_numbers, split_number):
        x0 = to_unit(images, num_levels)
        keys = randomness.per_item(jax.random.fold_in(seed_key, split_number), image_numbers)
        denoise, schedule = experiment.denoiser(params), experiment.schedule_of(params)
        terms = likelihood.vlb_terms_bpd(denoise, experiment.p, schedule, x0, keys, num_levels, decoder=decoder)
        return *terms, jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)

    compiled = parallel.over_devices(one_batch)

    def bound(replicated_params: PyTree, image_set: ImageSet, numbers: Int[np.ndarray, " n"]) -> Bound:
        def score(items):
            split = np.full(len(items), image_set.split_number)
            return compiled(replicated_params, image_set.images[numbers[items]], numbers[items], split)

        batch_size = experiment.config.eval.batch_size
        terms, x0_mse, prior = _in_batches(score, len(numbers), batch_size, f"score {image_set.split}", "image")
        x0_mse *= ((num_levels - 1) / 2) ** 2
        kl = terms[:, 1:].sum(axis=1)
        return Bound(terms[:, 0], kl, prior, x0_mse[:, 0], terms_bpd=terms, x0_mse=x0_mse)

    return bound


def estimated_bound_of(experiment: Experiment) -> Callable[[PyTree, ImageSet, np.ndarray], Bound]:
    """`bound_of` from eval.terms_per_image terms of each image: see `estimators`.

    A term is the number that the full evaluation would compute, with the same ε, so that what is estimated is
    that evaluation's result. One compiled program scores batches of (image, t).
    """
    num_levels, config = experiment.num_levels, experiment.config
    seed_key = randomness.stream(config.seed, "eval")
    decoder = likelihood.PROTOCOLS[config.eval.protocol].decoder

    def one_batch(params, images, image_numbers, split_number, t):
        x0 = to_unit(images, num_levels)
        keys = randomness.per_item(jax.random.fold_in(seed_key, split_number), image_numbers)
        denoise, schedule = experiment.denoiser(params), experiment.schedule_of(params)
        scores = likelihood.vlb_batch_bpd(denoise, experiment.p, schedule[t], x0, keys, num_levels, decoder=decoder)
        return *scores, jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)

    compiled = parallel.over_devices(one_batch)

    def at(replicated_params, image_set, numbers, t, name):
        """The terms, the squared errors of x̂_0 and the priors of images [N] at t [N, terms], each [N, terms]."""

        def score(items):
            image_numbers = numbers[items // t.shape[1]]
            split = np.full(len(items), image_set.split_number)
            return compiled(replicated_params, image_set.images[image_numbers], image_numbers, split, t.ravel()[items])

        flat = _in_batches(score, t.size, config.eval.batch_size, f"score {name}", "term")
        return [array.reshape(t.shape) for array in flat]

    def bound(replicated_params: PyTree, image_set: ImageSet, numbers: Int[np.ndarray, " n"]) -> Bound:
        every_t = np.arange(1, config.schedule.num_steps + 1)
        pilot = numbers[np.linspace(0, len(numbers) - 1, min(PILOT_IMAGES, len(numbers))).astype(int)]
        pilot_t = np.tile(every_t, (len(pilot), 1))
        pilot_terms, _, _ = at(replicated_params, image_set, pilot, pilot_t, f"{image_set.split}, pilot")
        q = estimators.proposal(pilot_terms)
        keys = randomness.per_item(jax.random.fold_in(seed_key, image_set.split_number), jnp.asarray(numbers))
        # t = 0 has no ε, so its number is free to mean the choice of t.
        offsets = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (2,)))(keys)
        t = estimators.draw_t(q, np.asarray(offsets, np.float64), config.eval.terms_per_image)
        terms, x0_mse, prior = at(replicated_params, image_set, numbers, t, image_set.split)
        estimate = estimators.estimate(terms, t, q)
        decoded_mse = x0_mse[:, 0] * ((num_levels - 1) / 2) ** 2
        return Bound(estimate.decoder_bpd, estimate.kl_bpd, prior[:, 0], decoded_mse, estimate.sampling_stderr)

    return bound


def _in_batches(
    score: Callable[[np.ndarray], tuple[jax.Array, ...]], num_items: int, batch_size: int, desc: str, unit: str
) -> list[Float[np.ndarray, "n ..."]]:
    """score's results for the items 0…num_items − 1, each item once, in float64 for the sums to come."""
    results = []
    with report.Progress(num_items, desc=desc, unit=unit) as progress:
        for numbers, num_real in parallel.padded_batches(num_items, batch_size):
            results.append([parallel.gather(array, num_real) for array in score(numbers)])
            progress.update(num_real)
    return [np.concatenate(parts).astype(np.float64) for parts in zip(*results, strict=True)]
