"""Images from files, with exactly their pixel values: .npy, .npz, or a folder of pictures."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion.data.folder import decoding, listing
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
    try:
        with decoding.opened(path) as picture:
            size, mode = picture.size, picture.mode
            is_changed_by_decoding = picture.has_transparency_data or decoding.orientation(picture) != 1
        if is_changed_by_decoding:
            raise ValueError(f"{path} is transparent or turned by its EXIF tag; save it as it should be seen")
        wanted = decoding.MODES[target.channels]
        modes = (wanted, "P") if wanted == "RGB" else (wanted,)
        if size != (target.width, target.height) or mode not in modes:
            raise ValueError(
                f"{path} is a picture of {size[1]}×{size[0]} in mode {mode}, but the model's are {_size(target.shape)}"
            )
        return decoding.to_pixels(path.read_bytes(), target)
    except (decoding.Unreadable, Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
