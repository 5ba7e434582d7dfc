"""The importance-weighted bound of every image of a split, with the effective sample size of its weights.

Burda, Grosse & Salakhutdinov (2016): −log 1/K Σ_k w_k with w_k = p_θ(x_0, …, x_T)/q(x_1, …, x_T | x_0), for K
trajectories. Its mean is the bound at K = 1. The mean falls with K and is never below −log p_θ(x_0).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from diffusion import guidance, likelihood
from diffusion.data import Source
from diffusion.evaluation import kept
from diffusion.evaluation.pairs import ImagePairs
from diffusion.model import Model
from diffusion.runtime.devices import Replicated

STREAM = "importance"  # of the trajectories' noise


@dataclasses.dataclass(frozen=True)
class Importance:
    """eval.likelihood="importance(samples=64)".

    Attributes:
        samples: K, the number of trajectories of each image.
    """

    KIND: ClassVar[str] = "importance"
    IS_OF_THE_CHAIN: ClassVar[bool] = True  # whether the reverse process's variance and decoder play a part

    samples: int = 64

    def __post_init__(self):
        if not 2 <= self.samples <= 1_000_000:
            raise ValueError(f"samples={self.samples} must be in 2…1,000,000; one is the bound")

    def check(self, prediction: str) -> None:
        """Every model has this likelihood."""

    def check_installed(self) -> None:
        """This likelihood needs no extra."""

    def name(self, protocol: str, variance: str) -> str:
        """The name that distinguishes its results from others of the same checkpoint and images."""
        return f"{protocol}-{variance}-importance_{self.samples}"

    def about(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """The protocol of this measurement, made from the bound's."""
        what = f"{self.samples} trajectories per image, log of their mean weight"
        chain = {name: value for name, value in protocol.items() if name not in ("limit", "draws_per_term")}
        return chain | {"likelihood": "importance-weighted bound", "estimator": what}

    def of_split(
        self, seed: int, batch_size: int, protocol: str, stop: Callable[[], None] | None = None
    ) -> Callable[..., "Weights"]:
        """A function of (replicated model, source, numbers of the images, file or None), compiled once."""
        chosen = likelihood.PROTOCOLS[protocol]

        def log_weights(model: Model, labels: Array | None, x0: Array, keys: Array, samples: Array) -> Array:
            denoise = guidance.conditional(model.denoise, labels) if model.takes_labels else model.denoise
            keys = jax.vmap(jax.random.fold_in)(keys, samples)
            given = model.p, model.schedule, x0, keys, model.num_levels
            return likelihood.log_weights_nats(denoise, *given, chosen.clip_x0, chosen.decoder)[:, None]

        pairs = ImagePairs(log_weights, seed, batch_size, STREAM, stop, unit="trajectory")

        def weights(
            model: Replicated, source: Source, numbers: Int[np.ndarray, " n"], file: Path | None = None
        ) -> Weights:
            samples = np.tile(np.arange(self.samples), (len(numbers), 1))
            found = kept.measured(pairs, model, source, numbers, samples, 1, file, f"trajectories, {source.split}")
            return Weights(np.asarray(found[..., 0], np.float64), int(np.prod(source.image_shape)))

        return weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """log w of K trajectories for each of N images, and the number of dimensions of an image."""

    log_weights_nats: Float[np.ndarray, "n k"]
    num_dims: int

    @property
    def nats_per_bpd(self) -> float:
        return self.num_dims * np.log(2)

    def bpd(self, k: int) -> Float[np.ndarray, " n"]:
        """Each image's bound with k weights: the mean over as many groups of k as there are."""
        whole = self.log_weights_nats[:, : self.log_weights_nats.shape[1] // k * k]
        groups = whole.reshape(len(whole), -1, k)
        log_mean = scipy.special.logsumexp(groups, axis=2) - np.log(k)
        return -log_mean.mean(axis=1) / self.nats_per_bpd

    @property
    def effective(self) -> Float[np.ndarray, " n"]:
        """The effective sample size of each image, (Σ w)²/Σ w²: K for equal weights, 1 if one weight dominates.
        """
        weights = np.exp(self.log_weights_nats - self.log_weights_nats.max(axis=1, keepdims=True))
        return weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)

    @property
    def sampling_stderr(self) -> float:
        """The part of the standard error of the images' mean that is due to the choice of trajectories.

        The relative variance of an image's mean weight is (K/ESS − 1)/(K − 1). To first order this is the variance of
        its logarithm. It is too small if the effective sample size is near 1, because the rare weights were not seen.
        """
        num_images, k = self.log_weights_nats.shape
        variance = np.maximum(k / self.effective - 1, 0.0) / (k - 1)
        return float(np.sqrt(variance.sum()) / num_images / self.nats_per_bpd)

    def summary(self, split: str) -> dict[str, Any]:
        """Means over images with their standard errors, the bound of the same trajectories, and the difference."""
        k = self.log_weights_nats.shape[1]
        total, single = self.bpd(k), self.bpd(1)
        counts = [2**power for power in range(k.bit_length()) if 2**power < k] + [k]
        name = f"{split}_importance"
        return {
            f"{name}_bpd": total.mean(),
            f"{name}_bpd_stderr": stderr(total),
            f"{name}_bpd_sampling_stderr": self.sampling_stderr,
            f"{name}_ess": self.effective.mean(),
            f"{name}_ess_min": self.effective.min(),
            f"{name}_one_sample_bpd": single.mean(),
            f"{name}_one_sample_bpd_stderr": stderr(single),
            f"{name}_gain_bpd": (single - total).mean(),
            f"{name}_gain_bpd_stderr": stderr(single - total),
            f"{name}_bpd_by_samples": {str(count): self.bpd(count).mean() for count in counts},
            f"{name}_images": len(total),
        }

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """The saved numbers of every image."""
        bpd = self.bpd(self.log_weights_nats.shape[1])
        return {f"{split}_log_weights_nats": self.log_weights_nats, f"{split}_image_bpd": bpd}


def stderr(values: Float[np.ndarray, " n"]) -> float | None:
    """The standard error of the mean; None for a single value."""
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
