"""The kinds of Fréchet distances in a sweep: features, number of samples, sampler and reference."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from diffusion.reporting.page import numbers


class DistanceKind(NamedTuple):
    """The kind of a Fréchet distance. Only distances of the same kind are comparable."""

    title: str  # names the features; only with Inception's is the distance called FID
    features: str
    num_samples: int
    weights: str = ""  # a digest of the features' network
    sampler: str = ""  # how it differs from the model's own: every ancestral step, without guidance
    reference: str = ""  # a split with its number of images, or the name of a file with its digest

    def __str__(self) -> str:
        parts = [f"{self.title}, {self.num_samples:,} samples"]
        parts += [f"network {self.weights}"] if self.weights else []
        parts += [f"sampler {self.sampler}"] if self.sampler else []
        return ", ".join(parts + ([f"against {self.reference}"] if self.reference else []))


def distance_kind(config: Mapping[str, Any], quality: Mapping[str, Any]) -> DistanceKind | None:
    """The kind of Fréchet distance in a run's quality.json; None if there is none.

    Args:
        config: the run's config by key.
        quality: the contents of quality.json.
    """
    found = numbers.distance(dict(quality))
    if not found:
        return None
    weights = (quality.get("weights_sha256") or "")[:8]
    sampler = quality.get("sampler")
    used = dict(sampler) if isinstance(sampler, Mapping) else {}
    if guide := quality.get("guide_sha256"):  # a run that guides may have trained further between two measurements
        used["guide_sha256"] = guide[:8]
    about = weights, _sampler(config, used), _reference(quality.get("reference") or "")
    return DistanceKind(found.title, quality.get("features", ""), quality.get("num_samples", 0), *about)


def _sampler(config: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """The settings of a sampler that differ from the model's own. Models may differ in their T and variance."""
    own = {
        "method": "ancestral",
        "num_steps": config.get("schedule.num_steps"),
        "variance": config.get("model.variance"),
        "seed": used.get("seed"),
        "labels": "all in turn",
        "guidance": 0,
        "guidance_interval": "every t",
    }
    return ", ".join(f"{name}={value}" for name, value in used.items() if name not in own or value != own[name])


def _reference(name: str) -> str:
    """The name of a reference, with the first digits of a file's digest. Where the file lies does not matter."""
    path, is_file, sha256 = name.partition(", SHA-256 ")
    return f"{PurePath(path).name}, SHA-256 {sha256[:8]}" if is_file else name
