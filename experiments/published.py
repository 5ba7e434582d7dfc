"""The paper's bits/dim of a published model, and this codebase's bits/dim of the same weights.

    python -m experiments.published cifar10_uncond_50M_500K.pt --data_dir=DIR            # an estimate, with its error
    python -m experiments.published cifar10_uncond_50M_500K.pt --data_dir=DIR --full     # every term

A checkpoint of improved-diffusion or guided-diffusion is recognized by its published name. Other checkpoints of that
code need their training flags, in --flags=FILE.json or in the JSON file of the same name. PyTorch reads the file:
pip install -e '.[openai]'. ckpt-N.flax, or a directory with it, is a checkpoint of google-research/vdm. Its networks
are recognized; --flags=FILE.json is then its config.model. A directory with PREFIX.index, or PREFIX itself, is a
TensorFlow checkpoint of Ho et al.'s original code. Any other directory is a pipeline of diffusers, with the settings of
its scheduler. Ho et al.'s network for CIFAR-10 is recognized in both. By default a model is scored on the test split of
the paper's data set with the paper's protocol. A VDM is scored for T = ∞ and T = 1000.

Writes published.json and finished terms into the working directory. The same command resumes after a kill or a signal.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion import data, interop, likelihood
from diffusion.data import Source
from diffusion.evaluation import bound, images
from diffusion.evaluation.limit import for_protocol, limit
from diffusion.interop import ho2020, openai_flags, pipelines, vdm, vdm_config
from diffusion.interop.files import find
from diffusion.model import Model
from diffusion.reporting import summary
from diffusion.runtime import devices, files
from diffusion.runtime.digests import short_sha256, tree_sha256
from diffusion.runtime.preemption import Preemption
from experiments import published_rows, tables
from experiments.commands import argument_parser, exit_with
from experiments.published_rows import Row

ERRORS = ("test_limit_bpd_stderr", "test_limit_bpd_sampling_stderr")
LEAST = {"num_images": 0, "batch_size": 1, "seed": 0}
PROTOCOL = "exact"  # for a model without a known paper


class Checkpoint(NamedTuple):
    """A given checkpoint.

    Attributes:
        model: the model with its weights.
        image_shape: (H, W, C); H and W are None if the model takes any size.
        about: settings that distinguish it from others with the same weights.
        row: the published row; None if there is none.
    """

    model: Model
    image_shape: tuple[int | None, int | None, int]
    about: dict[str, Any]
    row: Row | None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", help="FILE.pt, a directory, or PREFIX of PREFIX.index")
    parser.add_argument("--flags", default="", help="JSON file with the flags that it was trained with")
    parser.add_argument("--data", default="", help="data.name of the images; default: the paper's")
    parser.add_argument("--data_dir", default="", help="directory of prepared data sets; default: TFDS's")
    parser.add_argument("--protocol", default="", choices=likelihood.PROTOCOLS, help="default: the paper's")
    parser.add_argument("--full", action="store_true", help="every term of every image, not an estimate")
    parser.add_argument("--terms", type=int, default=9, help="terms per image in the estimate, an odd number ≥ 3")
    parser.add_argument("--num_images", type=int, default=0, help="number of test images; 0: all")
    parser.add_argument("--batch_size", type=int, default=256, help="pairs of image and t per batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--workdir", default="", help="default: runs/published/NAME")
    arguments = parser.parse_args(argv)
    if not arguments.full and (arguments.terms < 3 or arguments.terms % 2 == 0):
        raise ValueError(f"--terms={arguments.terms} must be an odd number ≥ 3")
    for name, least in LEAST.items():
        if not least <= (value := getattr(arguments, name)) < 2**31:
            raise ValueError(f"--{name}={value} must be an integer in {least}…2³¹ − 1")
    weights = files.expanded(arguments.weights)
    given = found_at(weights, arguments.flags)
    row = given.row
    name = arguments.data or (row.data if row else "")
    if not name:
        raise ValueError(f"{weights}: no data set is known for it; choose a prepared one with --data=NAME")
    test_set = data.load(name, "test", arguments.data_dir)
    check(given, test_set)
    protocol = arguments.protocol or (row.protocol if row else PROTOCOL)
    settings = bound.Settings(arguments.seed, arguments.batch_size, protocol, 0 if arguments.full else arguments.terms)
    name_of_weights = weights.stem if weights.exists() else weights.name  # a prefix ends with its step
    directory = files.expanded(arguments.workdir or f"runs/published/{name_of_weights}")
    directory.mkdir(parents=True, exist_ok=True)
    # The number of heads, for example, is only in the flags: a digest of the weights does not depend on it.
    kept = directory / short_sha256([given.about, tree_sha256(given.model)])
    with Preemption():
        found = score(given.model, test_set, settings, arguments.num_images, kept)
    compared = bool(row and name == row.data and row.test_bpd is not None)
    about = {"weights": weights.name, "params_sha256": tree_sha256(given.model.denoise), **given.about, "data": name}
    about |= {"paper_bpd": row.test_bpd if compared else None, "source": row.source if compared else ""}
    summary.write_json(directory / "published.json", about | found | {"device": summary.device_name()})
    print(markdown(about | found))


def found_at(weights: Path, flags_file: str) -> Checkpoint:
    """The checkpoint, recognized by the names of its files.

    Raises:
        FileNotFoundError: the directory holds no known checkpoint.
        ValueError: --flags is given for a checkpoint that takes none. The function of each kind raises others.
    """
    if of_vdm := vdm.newest(weights):
        return vdm_checkpoint(of_vdm, flags_file)
    prefix = ho2020.find(weights)
    if prefix is None and not weights.is_dir():
        return checkpoint(weights, flags_file)
    if flags_file:
        raise ValueError(f"--flags={flags_file} is not used here: {weights} has its settings in its own files")
    if prefix is None and not any(path.is_file() for path in pipelines.places(weights)):
        raise FileNotFoundError(
            f"{weights} holds none of ckpt-N.flax, PREFIX.index and {pipelines.SCHEDULER_FILE}; name a .pt file itself"
        )
    return pipeline(weights) if prefix is None else ho2020_checkpoint(prefix)


def vdm_checkpoint(path: Path, config_file: str) -> Checkpoint:
    """A checkpoint of google-research/vdm. Raises the errors of `interop.load_vdm` and `vdm_config.from_file`."""
    config = vdm_config.from_file(files.expanded(config_file)) if config_file else {}
    model, told = vdm.loaded(path, config)
    row = published_rows.VDM.get(tuple(told[name] for name in published_rows.VDM_KEYS))
    return Checkpoint(model, (None, None, model.denoise.func.module.out_channels), {"config": told | config}, row)


def ho2020_checkpoint(prefix: Path) -> Checkpoint:
    """A checkpoint of Ho et al.'s original code. Raises the errors of `interop.load_ho2020`."""
    model = interop.load_ho2020(prefix)
    row = published_rows.HO2020 if published_rows.is_ho2020(model) else None
    about = {"network": str(model.denoise.func.module), "process": str(model.p)}
    return Checkpoint(model, ho2020.image_shape(model), about, row)


def pipeline(directory: Path) -> Checkpoint:
    """A pipeline of diffusers. Raises the errors of `interop.load_pipeline`."""
    model = interop.load_pipeline(directory)
    settings = json.loads(find(directory).config.read_text())
    height, width = np.broadcast_to(settings["sample_size"], 2).tolist()
    row = published_rows.HO2020 if published_rows.is_ho2020(model) else None
    about = {"network": str(model.denoise.func.module), "process": str(model.p)}
    return Checkpoint(model, (height, width, settings["in_channels"]), about, row)


def checkpoint(weights: Path, flags_file: str) -> Checkpoint:
    """A checkpoint of OpenAI's code. Raises the errors of `recognized` and `interop.load_openai`."""
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist")
    flags, row = recognized(weights, flags_file)
    shape = (flags["image_size"], flags["image_size"], openai_flags.NUM_CHANNELS_OF_IMAGES)
    return Checkpoint(interop.load_openai(weights, flags), shape, {"flags": flags}, row)


def recognized(weights: Path, flags_file: str) -> tuple[dict[str, Any], Row | None]:
    """The flags of a checkpoint, and the published row of its name, if there is one.

    Raises:
        FileNotFoundError: it is not a published file, and there is no file with its flags.
        ValueError: the flags cannot be read, or contradict the published ones of a file of this name.
    """
    row = published_rows.by_name(weights.stem)
    if flags_file:
        flags = openai_flags.from_file(files.expanded(flags_file))
    elif row and not weights.with_suffix(".json").is_file():
        flags = openai_flags.read(row.flags)
    else:
        flags = openai_flags.beside(weights)
    if row and not published_rows.agrees(row, flags):
        raise ValueError(f"{weights} has a published name, but not the published flags: rename it or drop the flags")
    return flags, row


def check(given: Checkpoint, test_set: Source) -> None:
    """Raises a ValueError if the model does not take these images or their labels."""
    if any(size not in (None, own) for size, own in zip(given.image_shape, test_set.image_shape, strict=True)):
        raise ValueError(
            f"data.name={test_set.name!r} has images {test_set.image_shape}; the model takes {given.image_shape}"
        )
    if given.model.takes_labels:
        test_set.labels()
        known = given.model.denoise.func.module.num_classes
        if known != test_set.num_classes:
            raise ValueError(f"data.name={test_set.name!r} has {test_set.num_classes} classes; the model has {known}")


def score(model: Model, test_set: Source, settings: bound.Settings, num_images: int, kept: Path) -> dict[str, Any]:
    """Bits/dim with their standard errors, their parts, and the protocol.

    A model that takes labels is given each image's own, so its bits/dim are of the image with a known label. The entry
    test_with_label_bpd adds the bits of a label.

    Args:
        kept: the directory of this model's finished terms, which are not computed again.
    """
    numbers = images.of_test_split(num_images, settings.protocol, len(test_set))
    few = settings.terms_per_image
    model, chosen = for_protocol(model, settings.protocol), likelihood.PROTOCOLS[settings.protocol]
    replicated = devices.replicate(model)
    terms_of = [test_set.sha256(), settings.seed, settings.protocol, numbers.tolist(), *([few] if few else [])]
    path = kept / f"{short_sha256(terms_of)}.npy"
    method = bound.estimated_bound if few else bound.full_bound
    found = method(settings)(replicated, test_set, numbers, path)
    protocol = {
        "protocol": settings.protocol,
        "decoder_cdf": chosen.decoder_cdf,
        "x0_clipped": chosen.clip_x0,
        "terms": f"{few} terms per image" if few else "every term",
        "num_steps": model.schedule.num_steps,
        "images": f"{len(numbers)} of {len(test_set)}",
        "seed": settings.seed,
    }
    scores = found.summary("test") | {"prior_bpd": found.prior_bpd.mean()}
    if chosen.kl_terms:
        at_limit = limit(settings)(replicated, test_set, numbers, found, path.with_stem(f"{path.stem}_limit"))
        of_limit = at_limit.summary("test_limit")
        scores |= {name: of_limit[name] for name in ("test_limit_bpd", *ERRORS)}
    if model.takes_labels:
        protocol["labels"] = "given"
        scores["label_bpd"] = likelihood.label_bpd(test_set.num_classes, test_set.image_shape)
        scores["test_with_label_bpd"] = scores["test_bpd"] + scores["label_bpd"]
    return protocol | scores


def markdown(found: dict[str, Any]) -> str:
    """Both numbers, one below the other, and the protocol."""
    paper = "–" if found["paper_bpd"] is None else f"{found['paper_bpd']:.2f}"
    rows = [["the paper", paper, "–", found["source"] or "it has no bits/dim for these weights and images"]]
    measured = f"{found['data']}, {found['images']} test images, protocol {found['protocol']}"
    if "label_bpd" in found:
        measured += f", labels given (a label costs {found['label_bpd']:.4f})"
    if "test_limit_bpd" in found:
        rows.append(["here, T = ∞", *_cells(found, "test_limit_bpd", True), f"{measured}, a few instants per image"])
    here = f"here, T = {found['num_steps'] - 1}" if "test_limit_bpd" in found else "here"
    rows.append([here, *_cells(found, "test_bpd", found["terms"] != "every term"), f"{measured}, {found['terms']}"])
    columns = [found["weights"], "bits/dim ± standard error over images", "± of the estimate", "measured"]
    return tables.markdown(columns, rows)


def _cells(found: dict[str, Any], name: str, is_estimate: bool) -> list[str]:
    """A number with its standard error over images, and the error of the estimate."""
    stderr = found[f"{name}_stderr"]
    number = f"{found[name]:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
    return [number, f"{found[f'{name}_sampling_stderr']:.4f}" if is_estimate else "–"]


if __name__ == "__main__":
    exit_with(main)
