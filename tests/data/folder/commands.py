"""The folder command as tests call it, and its results."""

import os

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion.data.folder import __main__ as program
from diffusion.data.folder import decoding

NOT_UTF_8 = os.fsdecode(b"caf\xe9.png")


def picture(number, height=8, width=8):
    """A picture of its own for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        image.save(file, **options)


def plain_folder(root, number=30):
    """A folder of PNG pictures of 8x8 pixels."""
    for i in range(number):
        save(picture(i), root / f"{i:02d}.png", format="PNG")
    return root


def command(pictures, root, *flags, name="pets", size=8):
    return [str(pictures), f"--name={name}", f"--size={size}", f"--data-dir={root}", "--workers=1", *flags]


def run(pictures, root, *flags, **options):
    """The exit code of the command."""
    return program.main(command(pictures, root, *flags, **options))


def undisturbed(pictures, root):
    """The files of a preparation that was not stopped."""
    assert run(pictures, root, "--test-fraction=0.3") == 0
    return files_of(root / "pets" / "1.0.0")


def files_of(directory):
    """The content of every file, by its path in the directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def records(root, split, name="pets"):
    """The examples of a split as TFDS itself reads them."""
    return tfds.builder_from_directory(root / name / "1.0.0").as_data_source(split)


def last_error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def interrupt(monkeypatch, after):
    """Lets the decoder of pictures fail as if the program was stopped, after so many pictures."""
    original, left = decoding.to_pixels, iter(range(after))

    def to_pixels(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(decoding, "to_pixels", to_pixels)
