"""Images from files, with exactly their pixel values: .npy, .npz, or a folder of pictures."""

import functools
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from diffusion.data.folder import decoding, listing, metadata, png
from diffusion.runtime import files


def read(path: Path, image_shape: tuple[int, int, int], num_levels: int) -> UInt8[np.ndarray, "n h w c"]:
    """The images in `path`, in its order. A folder is ordered by the paths of its pictures.

    Args:
        path: an .npy file; an .npz file with an array `images` or a single array; or a folder.
        image_shape: the required (H, W, C); nothing is resized.
        num_levels: all pixel values must be below it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or its images do not fit.
    """
    if path.is_dir():
        images = _pictures(path, image_shape)
    else:
        images = _array(path)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path} must hold uint8 [N, H, W, C], not {images.dtype} {list(images.shape)}")
    if images.shape[1:] != image_shape:
        raise ValueError(f"{path} has images of {_size(images.shape[1:])}, but the model's are {_size(image_shape)}")
    if not len(images):
        raise ValueError(f"{path} has no images")
    if images.max() >= num_levels:
        raise ValueError(f"{path} has a pixel value {images.max()}, but the model's are 0…{num_levels - 1}")
    return images


def _array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            name = "images" if "images" in loaded or len(loaded.files) != 1 else loaded.files[0]
            array = loaded[name]
    except KeyError as error:
        raise ValueError(f"{path} has several arrays and none is called images") from error
    except files.DAMAGE as error:
        raise ValueError(f"{path} is neither an .npy or .npz file nor a folder, or it is damaged") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is a .zip file without NumPy arrays")
    return array


def _pictures(folder: Path, image_shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    found = listing.scan(folder)
    if found.unread:
        raise ValueError(f"{folder / found.unread[0].path} cannot be read: {found.unread[0].reason}")
    target = decoding.Target(*image_shape, crop="none")
    return np.array([_picture(folder / file.path, target) for file in found.pictures], np.uint8).reshape(
        -1, *image_shape
    )


def _picture(path: Path, target: decoding.Target) -> UInt8[np.ndarray, "h w c"]:
    data = path.read_bytes()
    try:
        objection = metadata.tolerated(functools.partial(_objection, target), data)
        if not objection:
            return decoding.to_pixels(data, target)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises different types for garbage
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    raise ValueError(f"{path} {objection}")


def _objection(target: decoding.Target, data: bytes) -> str:
    """Why decoding would change or leave out something of a picture file; "" if it does not."""
    with decoding.opened(io.BytesIO(data)) as picture:
        if getattr(picture, "is_animated", False):
            return "has more than one frame; save each one as a file of its own"
        if (bits := _bits(picture, data)) > 8:
            return f"has {bits} bits per channel, but the model's images have 8"
        if picture.has_transparency_data or decoding.orientation(picture) != 1:
            return "is transparent or turned by its EXIF tag; save it as it should be seen"
        wanted, (width, height) = decoding.MODES[target.channels], picture.size
        modes = (wanted, "P") if wanted == "RGB" else (wanted,)
        if (width, height) != (target.width, target.height) or picture.mode not in modes:
            wanted_size = _size(target.shape)
            return f"is a picture of {height}×{width} in mode {picture.mode}, but the model's are {wanted_size}"
    return ""


def _bits(picture: Image.Image, data: bytes) -> int:
    """The bits of a channel in a picture's file. Pillow drops those beyond 8 of an RGB picture."""
    if picture.format == "PNG":
        return png.bits(data)
    return max(picture.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))) if picture.format == "TIFF" else 8


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
