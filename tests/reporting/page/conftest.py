"""Small, complete working directories, and a reader of pages that checks their contents."""

import dataclasses
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusion.reporting import page, pictures

VOID = {"img", "link", "meta"}
PLOTS = ("loss.png", "bpd.png", "rate_distortion.png", "schedule.png")
CONFIG = {
    "seed": 0, "init_from": "",
    "data": {"name": "digits", "data_dir": "", "flip": False},
    "model": {"network": "unet", "prediction": "v", "variance": "learned_range"},
    "unet": {"channels": 32, "channel_mult": [1, 2]},
    "objective": {"name": "vlb"},
    "schedule": {"name": "cosine", "num_steps": 6},
    "train": {"num_steps": 60, "batch_size": 32},
}  # fmt: skip
SUMMARY = {
    "step": 60, "num_params": 703362, "protocol": {"name": "exact", "x0_clipped": True, "seed": 0},
    "test_bpd": 2.0123456789012345, "test_bpd_stderr": 0.013159656380072820, "test_bpd_sampling_stderr": 0.0,
    "test_decoder_bpd": 0.24, "test_kl_bpd": 1.7723451769936774, "test_rate_bpd": 1.77234567890123,
    "test_distortion_bpd": 0.24, "test_distortion_rmse": 0.27, "test_images": 299,
    "train_bpd": 1.9792817163294631, "train_bpd_stderr": 0.012, "train_decoder_bpd": 0.25, "train_kl_bpd": 1.729,
    "train_rate_bpd": 1.7291, "train_distortion_rmse": 0.28, "train_images": 299,
    "test_bpd_by_class": [1.9, None, 2.1], "prior_bpd": 5.018595184493738e-07,
    "params_sha256": "ab" * 32, "ema_sha256": "cd" * 32, "seconds": 147.60147, "device": "cpu ×1",
    "versions": {"python": "3.11.7", "jax": "0.10.1"},
}  # fmt: skip
QUALITY = {
    "frechet_distance": 33.27570723499049, "frechet_distance_test_split": 0.45998528075136136, "num_samples": 200,
    "kid": 0.0123, "kid_std": 0.0004, "frechet_equal_n": 40.5, "frechet_equal_n_stderr": 0.25,
    "frechet_equal_n_images": 100, "frechet_equal_n_test_split": 1.75,
    "features": "pixels", "reference": "digits, train split", "step": 60,
    "note": "of few images", "sampler": {"method": "ancestral", "num_steps": 6},
}  # fmt: skip
SHAPE, NUM_LEVELS, NUM_FRAMES = (8, 8, 1), 17, 4


def write_run(directory: Path, **changes) -> Path:
    """A finished run with every file that a page reads, in the form in which the programs write them.

    Args:
        changes: of config.json, such as seed=1.
    """
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": CONFIG | changes, "base.json": {"config": "configs/digits.py", "values": CONFIG},
        "summary.json": SUMMARY, "quality.json": QUALITY, "eval.json": SUMMARY,
    }  # fmt: skip
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document))
    evaluation = directory / "evaluations" / "step60-ho2020-learned_range-all-299images"
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / "eval.json").write_text(json.dumps(SUMMARY | {"test_bpd": 2.5}))
    rows = [{"step": step, "loss": 5 / step, "grad_norm": 1.0} for step in range(1, 61)] + [
        {"step": 61, "val_loss": 1.5}
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = rng.integers(0, NUM_LEVELS, (9, *SHAPE)).astype(np.uint8)
    frames = rng.integers(0, NUM_LEVELS, (3, NUM_FRAMES, *SHAPE)).astype(np.uint8)
    for name in ("samples.png", "samples_20.png", "samples_40.png"):
        pictures.save_png(directory / name, pictures.image_grid(images, NUM_LEVELS))
    pictures.save_png(directory / "progressive.png", pictures.trajectory_grid(frames, NUM_LEVELS))
    for i, name in enumerate(PLOTS):
        pictures.save_png(directory / name, np.full((40, 60 + i, 3), 200, np.uint8))
    return directory


@dataclasses.dataclass
class Read(HTMLParser):
    """A page as an HTML parser sees it.

    Attributes:
        problems: tags that are not balanced.
        elements: (name, attributes) of every element.
        texts: (names of the elements around it, text).
    """

    problems: list = dataclasses.field(default_factory=list)
    elements: list = dataclasses.field(default_factory=list)
    texts: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._open = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data):
        self.texts.append((tuple(self._open), data))

    def close(self):
        super().close()
        self.problems += self._open

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, within="body"):
        return "".join(text for around, text in self.texts if within in around and "script" not in around)

    def of(self, tag):
        """The texts directly in elements of this name."""
        return [text for around, text in self.texts if around and around[-1] == tag]

    @property
    def numbers(self):
        """Every number on the page, unrounded."""
        return [float(attributes["value"]) for attributes in self.all("data")]


def read(path: Path) -> Read:
    """The page, after every check that holds for all pages."""
    found = Read()
    text = path.read_text()
    found.feed(text)
    found.close()
    assert found.problems == [], "every tag has its end"
    identifiers = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for name, attributes in found.elements:
        assert not any(key.startswith("on") for key in attributes), "no script in an attribute"
        assert attributes.get("src", "data:").startswith("data:"), "a picture lies in the page"
        href = attributes.get("href", "#")
        assert ":" not in href or href == "data:,", "a link stays here"
        assert not href.startswith("#") or href == "#" or href[1:] in identifiers
        if name == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
    assert [name for name, _ in found.elements].count("script") == 1
    assert not found.all("iframe") and not found.all("object") and "@import" not in text
    assert len(text) < 12_000_000
    return found


@pytest.fixture
def run_directory(tmp_path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """(directory, changes of the config) -> the directory, with a finished run in it."""
    return write_run


@pytest.fixture
def read_page() -> Callable[[Path], Read]:
    """A run's or sweep's directory -> its page, made again and checked."""

    def made(directory: Path) -> Read:
        return read(page.write(directory))

    return made
