"""The samples of a run: by class, during training, and on their way from noise."""

import re

import numpy as np
from jaxtyping import UInt8

from diffusion.reporting import pictures
from diffusion.reporting.page import embedded
from diffusion.reporting.page.contents import Contents, Samples
from diffusion.reporting.page.markup import Markup, element, joined

GRID, TRAJECTORY = "samples.png", "progressive.png"
MAX_CLASSES, IMAGES_PER_CLASS = 20, 10
MAX_EARLIER = 8  # pictures of samples during training


def section(contents: Contents, samples: Samples | None) -> list[Markup]:
    """What was sampled last, a row per class where the images have labels, and samples during training."""
    if samples is not None and samples.labels is not None:
        parts = _by_class(samples, samples.labels)
    else:
        parts = _grid(contents, samples)
    return [*parts, *_earlier(contents)]


def _grid(contents: Contents, samples: Samples | None) -> list[Markup]:
    found = contents.picture(GRID)
    if found is None:
        return []
    data, pixels = found
    shown = embedded.image(pixels, "Samples of the model, side by side", data, enlarged=True)
    return [embedded.figure(shown, _caption(samples) if samples else "The first samples")]


def _caption(samples: Samples) -> str:
    shape = "×".join(map(str, samples.images.shape[1:]))
    return f"The first of {samples.total:,} samples, {shape}, {samples.num_levels} pixel values"


def _by_class(samples: Samples, labels: np.ndarray) -> list[Markup]:
    classes = np.unique(labels)
    shown = classes[:MAX_CLASSES]
    of_class = {int(label): samples.images[labels == label][:IMAGES_PER_CLASS] for label in shown}
    columns = max(map(len, of_class.values()))
    rows = []
    for label, images in of_class.items():
        grid = pictures.image_grid(images, samples.num_levels, columns)
        picture = embedded.image(
            grid, f"Samples of class {label}", max_bytes=embedded.MAX_BYTES // len(shown), enlarged=True
        )
        rows.append(element("div", element("span", f"class {label}"), picture, class_="row"))
    left_out = f"; the first {MAX_CLASSES} of {len(classes)} classes" if len(classes) > MAX_CLASSES else ""
    return [element("div", *rows), element("p", f"{_caption(samples)}, by class{left_out}", class_="quiet")]


def _earlier(contents: Contents) -> list[Markup]:
    """Samples during training, evenly chosen where there are many."""
    found = [re.fullmatch(r"samples_(\d+)\.png", name) for name in contents.matching("samples_*.png")]
    steps = np.array(sorted(int(match[1]) for match in found if match), object)
    if len(steps) == 0:
        return []
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, MAX_EARLIER).round().astype(int))]
    thumbs = []
    for step in chosen:
        picture = contents.picture(f"samples_{step}.png")
        if picture is not None:
            data, pixels = picture
            shown = embedded.image(pixels, f"Samples at step {step:,}", data, embedded.MAX_SMALL_BYTES, enlarged=True)
            thumbs.append(embedded.figure(shown, f"step {step:,}"))
    return [element("h3", "During training"), element("div", *thumbs, class_="thumbs")] if thumbs else []


def trajectory(contents: Contents, samples: Samples | None) -> list[Markup]:
    """x̂_0 from noise to image: a slider through the frames, and all of them as a strip."""
    found = contents.picture(TRAJECTORY)
    if found is None:
        return []
    data, pixels = found
    alt = "The network's guess of the finished image at each frame: a row per sample, from noise to image"
    strip = embedded.image(pixels, alt, data, embedded.MAX_TRAJECTORY_BYTES, enlarged=True)
    words = ", the network's guess of the finished image: a row per sample, from noise (left) to image (right)"
    caption = joined(["x̂", element("sub", "0"), words])
    parts = [embedded.figure(strip, caption)]
    if samples is not None:
        try:
            frames = pictures.images_of_grid(pixels, *samples.images.shape[1:3])
        except ValueError:  # an older picture, of images of another size
            return parts
        parts.insert(0, _film(frames))
    return parts


def _film(frames: UInt8[np.ndarray, "n f h w c"]) -> Markup:
    """A slider through the frames; the script shows it, because it does nothing without."""
    n, num_frames, height, width, channels = frames.shape
    # One picture for all frames, one above the other; each image shows its part of it.
    sprite = frames.transpose(1, 2, 0, 3, 4).reshape(num_frames * height, n * width, channels)
    data, _ = embedded.shrunk(embedded.encoded(sprite), sprite, embedded.MAX_TRAJECTORY_BYTES)
    tiles = [element("i", style=f"--x: {100 * i / max(1, n - 1):.4f}%") for i in range(n)]
    slider = element("input", type="range", min=1, max=num_frames, value=num_frames)
    return element(
        "div",
        element("div", *tiles, class_="frames", role="img", aria_label="The samples at the chosen frame"),
        element("label", "frame", slider, element("output")),
        class_="film",
        hidden=True,
        style=(
            f"--shape: {width} / {height}; --size: {100 * n}% {100 * num_frames}%; "
            f"--sprite: url({embedded.data_uri(data)})"
        ),
    )
