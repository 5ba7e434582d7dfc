"""--mode=decompress: restores the images in a file of --mode=compress exactly, or prints a one-line error."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.codec import Codec, Message
from diffusion.programs import compress
from diffusion.reporting.progress import Progress
from diffusion.runtime import coded_file, files
from diffusion.runtime.coded_file import Header
from diffusion.runtime.preemption import Preemption

# Fields of the header that must be equal here, in the order in which they are compared.
WHAT_DIFFERS = {
    "config": "with another model (digest of the config keys schedule.*, model.*, the network's and its variance)",
    "weights": "with other weights or another schedule (digest of the checkpoint's EMA)",
    "height": "of images of another height",
    "width": "of images of another width",
    "channels": "of images with other channels",
    "num_levels": "of images with another number of pixel values",
    "dtype": "with another dtype of the network (its number in coded_file.DTYPES)",
    "device": "on another kind of device, whose floats differ",
    "jax_version": "with another version of jax, whose floats may differ",
    "floats": "where the network computes other floats (digest of its output for a fixed input)",
}


def run(config: ConfigDict, directory: Path, input: str, output: str, checkpoint: str = "latest") -> None:
    """Writes the images in `input` as uint8 [N, H, W, C] into the array `images` of `output`, an .npz file.

    It needs the EMA parameters of the checkpoint that compressed them.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: there is no file `input`, or no checkpoint.
        ValueError: `input` is damaged, or was made with another model, on another kind of device or with other
            versions.
    """
    path = compress.new_file(output)
    if path.suffix != ".npz":
        raise ValueError(f"--output={output} must end in .npz")
    coded = files.expanded(input)
    if not coded.exists() or coded.is_dir():
        raise FileNotFoundError(f"--input={input} is no file; it must be one that --mode=compress wrote")
    header, words = coded_file.read(coded)
    experiment, model = compress.coding_model(config, directory, checkpoint)
    _check(input, header, compress.identity(experiment, model))
    codec = Codec(model, experiment.image_shape, header.batch_size, header.precision)
    _check(input, header, {"floats": compress.fingerprint(codec)})
    with Preemption(), Progress(header.num_images, desc="decompress", unit="image") as progress:
        try:
            images = codec.decode(Message(words, header.initial_words), header.num_images, progress.update)
        except ArithmeticError as error:
            raise ValueError(f"{input} cannot be decoded here, where floats do not repeat: {error}") from error
    if compress.pixel_digest(images) != header.pixels:
        raise ValueError(f"{input} cannot be decoded here, where floats do not repeat: other images came out")
    with files.replacing(path) as file:
        np.savez_compressed(file, images=images, num_levels=header.num_levels)
    print(f"{header.num_images} images, equal to those that were compressed: {path}")


def _check(input: str, header: Header, here: dict[str, Any]) -> None:
    """Raises a ValueError that says what differs between where the file was made and here."""
    for name, what in WHAT_DIFFERS.items():
        if name not in here:
            continue
        made, now = getattr(header, name), here[name]
        if made != now:
            values = (value.hex() if isinstance(value, bytes) else value for value in (made, now))
            raise ValueError(f"{input} was made {what}: {' there, '.join(map(str, values))} here")
