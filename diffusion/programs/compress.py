"""--mode=compress: writes images to a file of about the model's bound in size. --mode=decompress restores them."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion.codec import Codec
from diffusion.data import Source, pixel_files
from diffusion.data.source import SPLITS
from diffusion.evaluation import image_formats
from diffusion.evaluation.bound import Bound, estimated_bound, full_bound
from diffusion.experiment import build, memory, schema, workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.config import first_spelling, flatten
from diffusion.model import Model
from diffusion.reporting.progress import Progress
from diffusion.runtime import coded_file, devices, files
from diffusion.runtime.coded_file import Header
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.preemption import Preempted, Preemption

CODED_PROTOCOL = "exact"  # the one whose decoder, clip and steps are the codec's
# The keys that shape the model, as files have known them from the start. A key that came later is only in the digest
# of a file where the model is not what it was without that key.
KEYS_IN_EVERY_DIGEST = (
    *("schedule.name", "schedule.num_steps", "model.network", "model.prediction", "model.variance"),
    *("model.conditioning", "model.decoder", "model.conditional", "model.label_dropout"),
    *("unet.channels", "unet.channel_mult", "unet.num_res_blocks", "unet.attention_resolutions", "unet.mid_attention"),
    *("unet.num_groups", "unet.num_heads", "unet.dropout", "unet.scale_shift_norm", "unet.fourier_features"),
    "unet.dtype",
)


def run(config: ConfigDict, directory: Path, input: str, output: str, checkpoint: str = "latest") -> None:
    """Compresses images with the EMA parameters of a checkpoint of `directory`, and prints the bits used.

    Args:
        input: train, test, an .npy or .npz file of uint8 [N, H, W, C], or a folder of pictures of the model's size.
        output: the file to write.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: there is no such input or no checkpoint.
        ValueError: the images or the model cannot be coded; the message says why.
        ArithmeticError: the network's output is NaN or Inf.
    """
    path = new_file(output)
    experiment, model = coding_model(config, directory, checkpoint)
    with Preemption() as preemption:
        with preemption.at_points():
            source = _source(config, experiment, input)
        images = source.images()
        codec = Codec(model, source.image_shape, config.compress.batch_size, config.compress.precision)
        with (
            memory.shortage_explained(experiment, "compress.batch_size"),
            Progress(len(images), desc="compress", unit="image") as progress,
        ):
            message = codec.encode(images, config.seed, progress.update)
            floats = fingerprint(codec)
        header = Header(
            **identity(experiment, model),
            floats=floats,
            precision=config.compress.precision,
            batch_size=config.compress.batch_size,
            num_images=len(images),
            pixels=pixel_digest(images),
            initial_words=message.initial_words,
        )
        coded_file.write(path, header, message.words)
        # After the file, which needs less work than the bound that it is compared with.
        try:
            bound_bpd = _bound(config, model, source, preemption).image_bpd.mean()
        except Preempted as stop:
            print(json.dumps(_report(path, header, None, images, experiment), indent=2))
            stopped = stop.reason.partition(";")[0]
            raise Preempted(f"{stopped}; {path} is whole, and its bound was not computed") from stop
    print(json.dumps(_report(path, header, bound_bpd, images, experiment), indent=2))


def new_file(output: str) -> Path:
    """The path of a new file to write.

    Raises:
        FileExistsError: the file exists already.
        FileNotFoundError: its folder does not exist.
        PermissionError: its folder cannot be written to.
        ValueError: there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("--mode=compress and --mode=decompress run in one process; leave out --coordinator")
    path = files.expanded(output)
    if path.exists():
        raise FileExistsError(f"--output={output} exists; delete it or take another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output={output}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--output={output}: the folder {path.parent} cannot be written to")
    return path


def coding_model(config: ConfigDict, directory: Path, checkpoint: str) -> tuple[Experiment, Model]:
    """The model that the evaluation scores. A network that takes labels is used without them.

    Raises:
        ValueError: the network always needs labels.
    """
    loaded = workdir.load(directory, checkpoint, config)
    model = loaded.model_with(config.eval.variance)
    if model.takes_labels:
        if not config.model.label_dropout:
            raise ValueError("the file has no labels, which this network needs (it was trained with label_dropout=0)")
        model = model.without_labels()
    return loaded.experiment, model


def identity(experiment: Experiment, model: Model) -> dict[str, Any]:
    """The header's fields that must be equal at decoding, except its `fingerprint`."""
    dtype = jnp.dtype(getattr(experiment.training.network, "dtype", jnp.float32)).name
    height, width, channels = experiment.image_shape
    return {
        "weights": bytes.fromhex(tree_sha256(model))[: coded_file.DIGEST_BYTES],
        "config": _short_sha256(f"{_shaping_keys(experiment.config)} {model.p}".encode()),
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        "dtype": coded_file.DTYPES.index(dtype),
        "height": height,
        "width": width,
        "channels": channels,
        "num_levels": model.num_levels,
    }


def _shaping_keys(config: ConfigDict) -> list[tuple[str, Any]]:
    """The keys that say what the weights mean, and their values as the first version spelled them."""
    known, network = schema.all_keys(), f"{config.model.network.partition('(')[0]}."
    return sorted(
        (name, first_spelling(value))
        for name, value in flatten(config).items()
        if name.startswith(("schedule.", "model.", network))
        and not known[name].free
        and (name in KEYS_IN_EVERY_DIGEST or value != known[name].when_absent)
    )


def fingerprint(codec: Codec) -> bytes:
    """A short digest of the floats on which both directions must agree."""
    return codec.fingerprint()[: coded_file.DIGEST_BYTES]


def pixel_digest(images: UInt8[np.ndarray, "n h w c"]) -> bytes:
    """A short digest of the images."""
    return _short_sha256(np.ascontiguousarray(images))


def _short_sha256(data: bytes | np.ndarray) -> bytes:
    return hashlib.sha256(data).digest()[: coded_file.DIGEST_BYTES]


def _source(config: ConfigDict, experiment: Experiment, input: str) -> Source:
    """The images as a data set: a split, or those of a file, which count as a test split."""
    if input in SPLITS:
        source = build.load_data(config, input)
        if not len(source):
            of_key = f", because data.validation={config.data.validation}" if input == "validation" else ""
            raise ValueError(f"--input={input}: the {input} split has no images{of_key}")
        return source
    if not files.expanded(input).exists():
        raise FileNotFoundError(f"--input={input} is no file or folder, and none of {', '.join(SPLITS)}")
    num_levels = experiment.training.num_levels
    images = pixel_files.read(files.expanded(input), experiment.image_shape, num_levels)
    return Source(input, "test", images, num_levels)


def _bound(config: ConfigDict, model: Model, source: Source, preemption: Preemption) -> Bound:
    """The bound that the codec's length is that of, of the same images: `exact`, whatever eval.protocol is.

    The other protocols have another decoder, do not clip x̂_0, or have another number of steps than what is coded.
    """
    settings = dataclasses.replace(build.bound_settings(config), protocol=CODED_PROTOCOL)
    method = estimated_bound if settings.terms_per_image else full_bound
    return method(settings, preemption.check)(devices.replicate(model), source, np.arange(len(source)))


def _report(
    path: Path, header: Header, bound_bpd: float | None, images: UInt8[np.ndarray, "n h w c"], experiment: Experiment
) -> dict[str, Any]:
    """Bits/dim of the file, of the bound if it is known, and of other lossless formats, which need no weights."""
    weights = jax.tree.leaves(experiment.abstract_state().params)
    dims, file_bytes = images.size, path.stat().st_size
    initial_bits = 32 * header.initial_words
    others = {name: size for name, size in image_formats.sizes_bytes(images).items() if size is not None}
    net_bpd = (8 * file_bytes - initial_bits) / dims
    return {
        "file": str(path),
        "file_bytes": file_bytes,
        "weights_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in weights),
        "file_bpd": 8 * file_bytes / dims,
        "file_without_initial_bits_bpd": net_bpd,
        "bound_bpd": bound_bpd,
        "bound_protocol": CODED_PROTOCOL,
        "overhead_percent": None if bound_bpd is None else 100 * (net_bpd / bound_bpd - 1),
        "initial_bits": initial_bits,
        **{f"{name}_bpd": 8 * size / dims for name, size in others.items()},
        **{f"{name}_bytes": size for name, size in others.items()},
        "images": len(images),
    }
