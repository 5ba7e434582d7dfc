"""Images from files: the exact pixel values in the file's order, or a one-line error."""

import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_png import COLOUR, chunk, png

from diffusion.data import pixel_files

SHAPE = (6, 5, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, *SHAPE)).astype(np.uint8)


def test_arrays_and_folders_give_the_same_images(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.savez(tmp_path / "b.npz", images=IMAGES, num_levels=256)
    np.savez(tmp_path / "c.npz", x=IMAGES)
    (tmp_path / "folder" / "d").mkdir(parents=True)
    for name, image in zip(("a.png", "b.webp", "d/a.bmp", "e.png"), IMAGES, strict=True):
        Image.fromarray(image).save(tmp_path / "folder" / name, lossless=True)
    for name in ("a.npy", "b.npz", "c.npz", "folder"):
        np.testing.assert_array_equal(pixel_files.read(tmp_path / name, SHAPE, 256), IMAGES)


def test_grey_pictures_have_one_channel(tmp_path):
    Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixel_files.read(tmp_path, (6, 5, 1), 256), IMAGES[:1, ..., :1])


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda path: np.savez(path, x=IMAGES, y=IMAGES), "none is called images"),
        (lambda path: np.savez(path, x=IMAGES / 255), "must hold uint8"),
        (lambda path: np.savez(path, x=IMAGES[0]), "must hold uint8"),
        (lambda path: np.savez(path, x=IMAGES[:, :5]), "5×5×3, but the model's are 6×5×3"),
        (lambda path: np.savez(path, x=IMAGES[:0]), "has no images"),
        (lambda path: np.savez(path, x=np.full_like(IMAGES, 17)), "pixel value 17, but the model's are 0…16"),
        (lambda path: np.savez(path, x=np.array([{}])), "neither an .npy or .npz file"),
        (lambda path: path.write_bytes(b"PK\3\4 and no more"), "neither an .npy or .npz file"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("a.png", b"no array"), "without NumPy arrays"),
        (lambda path: path.write_bytes(b""), "neither an .npy or .npz file"),
    ],
)
def test_other_arrays_are_refused(save, words, tmp_path):
    path = tmp_path / "images.npz"
    save(path)
    with pytest.raises(ValueError, match=words):
        pixel_files.read(path, SHAPE, 17)


def test_other_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        pixel_files.read(tmp_path / "nothing.npz", SHAPE, 256)
    with pytest.raises(ValueError, match="has no images"):
        pixel_files.read(tmp_path, SHAPE, 256)
    Image.fromarray(IMAGES[0, :5]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is a picture of 5×5 in mode RGB, but the model's are 6×5×3"):
        pixel_files.read(tmp_path, SHAPE, 256)
    Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="in mode L"):
        pixel_files.read(tmp_path, SHAPE, 256)
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png", transparency=tuple(map(int, IMAGES[0, 0, 0])))
    with pytest.raises(ValueError, match="a.png is transparent or turned"):
        pixel_files.read(tmp_path, SHAPE, 256)
    Image.fromarray(IMAGES[0, ..., 0]).convert("P").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="in mode P"):
        pixel_files.read(tmp_path, (6, 5, 1), 256)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        pixel_files.read(tmp_path, SHAPE, 256)


def deep_tiff(values):
    """A TIFF file of 16 bits per channel, as Pillow does not write them. `values`: [H, W, 3]."""
    height, width, _ = values.shape
    strip = values.astype("<u2").tobytes()
    bits_at = 8 + len(strip)
    numbers = {256: width, 257: height, 258: bits_at, 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: len(strip)}
    kinds = {258: (3, 3), 273: (4, 1), 279: (4, 1)}
    entries = [struct.pack("<HHII", tag, *kinds.get(tag, (3, 1)), number) for tag, number in numbers.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits_at + 6) + strip + struct.pack("<3H", 16, 16, 16) + directory


def test_pictures_that_decoding_would_change_are_refused(tmp_path):
    """Pillow drops the lower 8 of 16 bits, and all frames but the first."""
    frames = {"save_all": True, "append_images": [Image.fromarray(IMAGES[1])]}
    for name, options in {"a.gif": {}, "b.png": {}, "c.webp": {"lossless": True}, "d.tif": {}, "e.jpg": {}}.items():
        Image.fromarray(IMAGES[0]).save(tmp_path / name, "MPO" if name == "e.jpg" else None, **options, **frames)
        with pytest.raises(ValueError, match=f"{name} has more than one frame; save each"):
            pixel_files.read(tmp_path, SHAPE, 256)
        if name == "b.png":  # its pictures are all needed, also where Pillow cannot parse what is not
            whole, after_header = (tmp_path / name).read_bytes(), 33
            (tmp_path / name).write_bytes(whole[:after_header] + chunk(b"gAMA", b"cut") + whole[after_header:])
            with pytest.raises(ValueError, match=f"{name} has more than one frame; save each"):
                pixel_files.read(tmp_path, SHAPE, 256)
        (tmp_path / name).unlink()
    deep = IMAGES[0].astype(np.uint16) << 8 | 1
    (tmp_path / "a.png").write_bytes(png(deep, 16, COLOUR, b""))
    with pytest.raises(ValueError, match="a.png has 16 bits per channel, but the model's images have 8"):
        pixel_files.read(tmp_path, SHAPE, 256)
    (tmp_path / "a.png").write_bytes(png(IMAGES[0], 8, COLOUR, b"", chunks=chunk(b"gAMA", b"cut")))
    np.testing.assert_array_equal(pixel_files.read(tmp_path, SHAPE, 256), IMAGES[:1])
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.tif").write_bytes(deep_tiff(deep))
    with pytest.raises(ValueError, match="b.tif has 16 bits per channel"):
        pixel_files.read(tmp_path, SHAPE, 256)


def test_damage_anywhere_in_an_archive_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", images=IMAGES // 16)
    data = (tmp_path / "whole.npz").read_bytes()
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            pixel_files.read(tmp_path / "damaged.npz", SHAPE, 256)
        except (ValueError, OSError):  # what main.py prints as one line
            pass
