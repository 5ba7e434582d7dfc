"""The bound of VDM: with more steps on the model's curve γ, and in the limit T = ∞ from a few instants per image."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from diffusion import continuous_time, likelihood
from diffusion.data import Source
from diffusion.evaluation import bound, estimators
from diffusion.evaluation.bound import Bound, Settings
from diffusion.model import Model
from diffusion.runtime.devices import Replicated
from diffusion.schedules import Schedule

POINTS = 8  # instants in each of an image's two samples, where every term of a finite T is computed


def for_protocol(model: Model, protocol: str) -> Model:
    """The model as the protocol scores it. A protocol of VDM's bound sets the number of steps and the decoder.

    Raises:
        ValueError: the protocol needs VDM's bound and the model has none.
    """
    chosen = likelihood.PROTOCOLS[protocol]
    if chosen.decoder is not None and model.p.decoder != "network":
        raise ValueError(f"the protocol {protocol!r} has a decoder of its own, and the model {model.p.decoder!r}")
    if not (kl_terms := chosen.kl_terms):
        return model
    if model.p.variance != "fixed_small" or model.p.prediction == "mean":
        raise ValueError(
            f"the protocol {protocol!r} scores the bound for T → ∞, which the variance {model.p.variance!r} with the "
            f"prediction {model.p.prediction!r} does not have; fixed_small with eps, x0 or v has"
        )
    if not _is_told_gamma(model.schedule):
        raise ValueError(
            f"the protocol {protocol!r} scores other numbers of steps than the model's {model.schedule.num_steps}, of "
            "which a network that is not conditioned on γ knows nothing"
        )
    # The knot γ_1 is one of our steps, and none of theirs.
    same = model.schedule.num_steps == kl_terms + 1
    schedule = model.schedule if same else continuous_time.resampled(model.schedule, kl_terms + 1)
    return dataclasses.replace(model, p=dataclasses.replace(model.p, decoder="bayes"), schedule=schedule)


def _is_told_gamma(schedule: Schedule) -> bool:
    """Whether network_t is a linear function of log SNR, with a finite end."""
    log_snr, told = (np.asarray(table, np.float64)[1:] for table in (schedule.log_snr, schedule.network_t))
    if len(told) < 2 or not np.isfinite(log_snr).all():
        return False
    line = told[0] + (told[-1] - told[0]) * (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    # The tables are float32: what they hold of a line is off by about 1e-7 of its range.
    return bool(np.allclose(told, line, rtol=0, atol=1e-5 * abs(told[-1] - told[0])))


def points(settings: Settings) -> int:
    """The number of instants in each of an image's two samples."""
    return (settings.terms_per_image - 1) // 2 if settings.terms_per_image else POINTS


def limit(settings: Settings, stop: Callable[[], None] | None = None) -> Callable[..., Bound]:
    """The bound for T = ∞, as a function of the arguments of `bound.full_bound` and, after the numbers, its result.

    The prior's and the decoder's terms do not depend on T, so they are taken from that result. The KL terms become ½ ∫
    dγ/dt E‖ε − ε̂‖² dt (Kingma et al. 2021, eq. 17). Each image takes two independent samples of evenly spaced
    instants.
    """
    pairs = bound.term_pairs(settings, stop)

    def of_images(
        model: Replicated,
        source: Source,
        numbers: Int[np.ndarray, " n"],
        finite: Bound,
        kept: Path | None = None,
    ) -> Bound:
        begin = bound.offsets(settings.seed, source, numbers)
        u = (begin[:, :, None] + np.arange(points(settings))) / points(settings)  # [n, 2, points], in [0, 1)
        length = bound.num_steps(model) - 1
        t = (1 + u * length).reshape(len(numbers), -1).astype(np.float32)
        found = bound.measured(pairs, model, source, numbers, t, kept, f"score {source.split}, T = ∞")
        losses = np.asarray(found[0], np.float64).reshape(u.shape)
        kl, stderr = estimators.of_two_samples(length * losses.mean(axis=2))
        without = {"terms_bpd": None, "x0_mse": None, "noise_stderr": None, "terms_noise_stderr": None}
        return dataclasses.replace(finite, kl_bpd=kl, sampling_stderr=stderr, **without)

    return of_images
