"""The density of every image of a split by the probability-flow ODE, in bits/dim of dequantized pixel values.

It is a likelihood of other data than the bound's, under another model than the reverse chain: see docs/likelihoods.md.
Its errors are measured too. The spread of several probes shows the error of Hutchinson's estimate of the divergence. A
second solve of a few images, with a tolerance ten times as large, shows the error of the solver.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion import guidance
from diffusion.data import Source
from diffusion.evaluation import kept
from diffusion.evaluation.importance import stderr
from diffusion.evaluation.pairs import ImagePairs
from diffusion.model import Model
from diffusion.runtime.devices import Replicated

STREAM = "ode"  # of the dequantization's noise and the probes
SOLVER_IMAGES = 8  # of each split, which are solved a second time
HINT = "; the network gave it, or the solver needs too many steps: take a larger tolerance"
ROUGHER = 10.0  # the second solve's tolerance, in units of the first one's


@dataclasses.dataclass(frozen=True)
class Ode:
    """eval.likelihood="ode(probes=4)".

    Attributes:
        tolerance: the relative and absolute error that the solver allows in a step.
        probes: the number of sign vectors for the divergence; 0 computes it exactly, with as many derivatives as an
            image has elements.
        dequantization: uniform over the bin of a pixel value, or like the noise in x_1.
        clip_x0: clip x̂_0 to [-1, 1], as the bound does.
    """

    KIND: ClassVar[str] = "ode"
    IS_OF_THE_CHAIN: ClassVar[bool] = False

    tolerance: float = 1e-5
    probes: int = 1
    dequantization: Literal["uniform", "truncated_normal"] = "uniform"
    clip_x0: bool = True

    def __post_init__(self):
        if not 1e-7 <= self.tolerance <= 0.1:
            raise ValueError(f"tolerance={self.tolerance} must be in [1e-7, 0.1], for float32")
        if not 0 <= self.probes <= 1000:
            raise ValueError(f"probes={self.probes} must be in 0…1000 (0: the exact divergence)")

    def check(self, prediction: str) -> None:
        """Raises a ValueError where the model has no ODE."""
        if prediction == "mean":
            raise ValueError("model.prediction='mean' predicts x_{t−1}, which has no ODE; take another prediction")

    def check_installed(self) -> None:
        """Raises a ValueError if the ODE solver is not installed."""
        if importlib.util.find_spec("diffrax") is None:
            raise ValueError("it needs the extra ode: pip install -c constraints.txt -e '.[ode]'")

    def name(self, protocol: str, variance: str) -> str:
        """The name that distinguishes its results from others of the same checkpoint and images."""
        clip = "" if self.clip_x0 else "-unclipped"
        return f"ode_{self.dequantization}_{self.probes}probes_{self.tolerance:g}{clip}"

    def about(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """The protocol of this measurement, made from the bound's."""
        of_bound = ("name", "decoder_cdf", "variance", "decoder", "estimator", "draws_per_term", "limit")
        shared = {name: value for name, value in protocol.items() if name not in of_bound}
        signs = f"{self.probes} vectors of signs (Hutchinson)" if self.probes else "exact"
        return {
            "likelihood": "density by the probability-flow ODE, of dequantized pixel values",
            "dequantization": self.dequantization,
            "divergence": signs,
            "tolerance": self.tolerance,
            "solver": "Tsitouras 5(4)",
        } | shared | {"x0_clipped": self.clip_x0}

    def of_split(
        self, seed: int, batch_size: int, protocol: str, stop: Callable[[], None] | None = None
    ) -> Callable[..., "Densities"]:
        """A function of (replicated model, source, numbers of the images, file or None), compiled once."""
        # The exact divergence takes as many derivatives of an image at once as it has elements.
        at_once = max(1, batch_size // self.probes) if self.probes else 1
        pairs = ImagePairs(self._densities, seed, at_once, STREAM, stop, unit="image")

        def densities(
            model: Replicated, source: Source, numbers: Int[np.ndarray, " n"], file: Path | None = None
        ) -> Densities:
            count = len(numbers)
            few = np.unique(np.linspace(0, count - 1, min(SOLVER_IMAGES, count)).astype(int))
            tolerances = np.full((count + len(few), 1), self.tolerance, np.float32)
            tolerances[count:] *= ROUGHER
            images, width = np.concatenate([numbers, numbers[few]]), max(1, self.probes) + 1
            given = model, source, images, tolerances, width, file, f"solve the ODE, {source.split}", HINT
            found = np.asarray(kept.measured(pairs, *given)[:, 0], np.float64)
            bpd, num_steps = found[:, :-1], found[:, -1]
            changes = bpd[count:].mean(axis=1) - bpd[few].mean(axis=1)
            return Densities(bpd[:count], num_steps[:count], float(np.abs(changes).mean()), self.probes == 0)

        return densities

    def _densities(
        self, model: Model, labels: Array | None, x0: Array, keys: Array, tolerances: Array
    ) -> Float[Array, "b width"]:
        """Bits/dim of each image by each probe, and the solver's steps."""
        from diffusion.exact import ode  # needs diffrax, nothing else of this module does

        def one(image: Array, label: Array | None, key: Array, tolerance: Array) -> Array:
            of_image = guidance.conditional(model.denoise, label[None]) if model.takes_labels else model.denoise
            predict = ode.eps_predictor(of_image, model.p, model.schedule, self.clip_x0)
            of_noise, of_probes = jax.random.split(key)
            given = of_noise, image, model.schedule, model.num_levels
            dequantized = ode.DEQUANTIZATIONS[self.dequantization](*given)
            signs = jax.random.rademacher(of_probes, (self.probes, *image.shape), jnp.float32)
            divergence = ode.hutchinson_each(signs) if self.probes else ode.exact_divergence
            bpd, num_steps = ode.density_bpd(predict, model.schedule, dequantized, divergence, tolerance)
            return jnp.append(bpd, num_steps.astype(jnp.float32))

        return jax.vmap(one, in_axes=(0, 0 if model.takes_labels else None, 0, 0))(x0, labels, keys, tolerances)


@dataclasses.dataclass(frozen=True)
class Densities:
    """Bits/dim of N dequantized images under the ODE's density, estimated with J probes."""

    probes_bpd: Float[np.ndarray, "n j"]
    num_steps: Float[np.ndarray, " n"]  # of the solver
    solver_error_bpd: float  # the mean change of a few images' bits/dim with ten times the tolerance
    is_exact: bool = False  # whether the divergence was, and not estimated with probes

    @property
    def image_bpd(self) -> Float[np.ndarray, " n"]:
        return self.probes_bpd.mean(axis=1)

    @property
    def probes_stderr(self) -> float | None:
        """The part of the standard error of the images' mean that is due to the choice of probes; None for one probe.

        The standard error over images already contains it.
        """
        num_images, num_probes = self.probes_bpd.shape
        if num_probes == 1:
            return 0.0 if self.is_exact else None
        return float(np.sqrt((self.probes_bpd.var(axis=1, ddof=1) / num_probes).sum()) / num_images)

    def summary(self, split: str) -> dict[str, Any]:
        """The mean over images with its errors. The data are dequantized, so no entry is called just "bpd"."""
        name = f"{split}_ode_density_bpd"
        return {
            name: self.image_bpd.mean(),
            f"{name}_stderr": stderr(self.image_bpd),
            f"{name}_probes_stderr": self.probes_stderr,
            f"{name}_solver_error": self.solver_error_bpd,
            f"{split}_ode_steps": self.num_steps.mean(),
            f"{split}_ode_images": len(self.probes_bpd),
        }

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """The saved numbers of every image."""
        return {f"{split}_probes_bpd": self.probes_bpd, f"{split}_num_steps": self.num_steps}
