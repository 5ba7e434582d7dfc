"""Every config key, once: its default, allowed values and help, and whether it may change between the legs of a run.

The defaults are those of Ho et al.'s (2020) CIFAR-10 experiment. The fields of a network are keys, too:
`unet.channels`. A run made before a key existed does not have the key. Its absence means the program's behaviour at
that time: `when_absent`.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from diffusion import grids, learned_schedule, likelihood, objectives, reverse, samplers, schedules, timesteps
from diffusion.data.source import DECODE, SPLITS
from diffusion.evaluation import likelihoods, quality
from diffusion.experiment import names
from diffusion.experiment.constraints import EMA_LENGTH, EMA_LENGTHS, FLAG, TEXT, Constraint, integer, number, of_type
from diffusion.experiment.names import Choice, Several
from diffusion.networks import NETWORKS
from diffusion.reporting import loggers
from diffusion.training import optimizer


class Partly(NamedTuple):
    """Some changes of a key between legs are allowed.

    Attributes:
        words: the changes that are allowed.
        why_not: (config, saved value) -> why this change is refused, or "".
    """

    words: str
    why_not: Callable[[ConfigDict, Any], str]


class Key(NamedTuple):
    """A config key.

    Attributes:
        default: the value for new runs.
        allowed: the allowed values.
        help: a line of help.
        free: whether it may change between the legs of a run: True, False, or the allowed changes.
        before: the value that reproduces the program before the key existed; None if this is the default.
    """

    default: Any
    allowed: Constraint | Choice | Several
    help: str
    free: bool | Partly = False
    before: Any = None

    @property
    def when_absent(self) -> Any:
        """The value that holds for a run made without the key."""
        return self.default if self.before is None else self.before

    @property
    def may_change(self) -> str:
        """`free` in words."""
        if isinstance(self.free, Partly):
            return self.free.words
        return "yes" if self.free else "no"


def _why_not_longer(config: ConfigDict, old: int) -> str:
    """Why a run of `old` steps cannot become longer; "" if it can, because no step depends on their number."""
    if config.train.num_steps < old:
        return "but a run can only become longer"
    if names.parse(config.schedule.name).name == learned_schedule.NAME:
        return "on which the learning rate of a learned schedule depends"
    made = np.linspace(0, max(0, old - 1 - config.optim.warmup_steps), 100).astype(int)
    decay = KEYS["optim.decay"].allowed.bind(config.optim.decay)
    rates = [decay(1.0, num_steps - config.optim.warmup_steps) for num_steps in (old, config.train.num_steps)]
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies integer steps by floats
        is_same = np.array_equal(*(rate(made) for rate in rates))
    return "" if is_same else f"on which optim.decay={config.optim.decay!r} depends"


def _why_not_skipping(config: ConfigDict, old: int) -> str:
    """Why the number of updates that may be left out cannot change; "" if it can."""
    is_same = (config.train.skip_nonfinite > 0) == (old > 0)
    return "" if is_same else "but 0 or more than 0 is settled when a run begins"


FREE = True
LONGER = Partly("only up", _why_not_longer)
ABOVE_0 = Partly("above 0", _why_not_skipping)

NETWORK_GIVEN = ("out_channels", "num_classes", "gamma_line", "parent", "name")
# The variance that the network was trained with, or one that needs nothing more than its mean.
FOR_A_TRAINED_MEAN = Choice({"model": None} | {k: v for k, v in reverse.VARIANCES.items() if not v.is_learned})
# The schedules from which a learned one can start.
FIXED_SCHEDULES = Choice(schedules.SCHEDULES, given=("num_steps",))
ALL_SCHEDULES = Choice(
    schedules.SCHEDULES | {learned_schedule.NAME: learned_schedule.Learned}, given=FIXED_SCHEDULES.given
)
# The optimal variance follows from a trained mean, so training cannot use it.
TRAINED_VARIANCES = Choice({name: v for name, v in reverse.VARIANCES.items() if name != "optimal"})
PREDICTIONS = Choice(reverse.PREDICTIONS)
OBJECTIVES = Choice(objectives.OBJECTIVES, given=("setting",))
TIMESTEPS = Choice(timesteps.SAMPLERS, given=("schedule",))
LIKELIHOODS = Choice(likelihoods.LIKELIHOODS)
METHODS = Choice(samplers.SAMPLERS)
GRIDS = Choice(grids.GRIDS, given=("schedule", "num_steps"))
LOGGERS = Several(Choice(loggers.LOGGERS, given=("directory", "step", "config")))
DECAYS = Choice(optimizer.DECAYS, given=("peak", "num_steps"))
SIDE = integer(0, at_most=65_536)
SHARE = number(0, 1 - 1e-12, "a number in [0, 1)")
RATE = number(1e-12, 10, "a number in (0, 10]")
CLIP = number(0, 1e12, "a number ≥ 0 (0: no clip)")
GUIDANCE = number(-1, 1000, "a number in [-1, 1000]")
TERMS = Constraint(
    lambda v: names.accepts(int, v) and (v == 0 or v >= 3 and v % 2 == 1), "0 (all) or an odd number ≥ 3"
)
PLACE = Constraint(
    lambda v: names.accepts(str, v) and v not in ("None", "none"),
    'a path, or "" for none (./None is a folder of that name)',
)
LABELS = Constraint(
    lambda v: names.accepts(tuple[int, ...], v) and min(v, default=0) >= 0, "a tuple of integers ≥ 0, or () for all"
)
INTERVAL = Constraint(
    lambda v: names.accepts(tuple[float, ...], v) and (v == () or len(v) == 2 and v[0] < v[1]),
    "(low, high) with low < high, or () for every t",
)
REFERENCE = Constraint(
    lambda v: names.accepts(str, v) and (v in SPLITS or v.endswith(".npz")),
    "train, test, validation or the path of an .npz file with mu and sigma",
)


def one_of(*words: str) -> Choice:
    return Choice(dict.fromkeys(words))


KEYS: dict[str, Key] = {
    "seed": Key(0, integer(0), "seed of all randomness"),
    "init_from": Key(
        "",
        PLACE,
        "published weights (DIR, FILE.pt, PREFIX of PREFIX.index), an export, or a run: DIR, DIR@best, DIR@STEP; "
        '"": random',
    ),
    "init_adapt": Key(False, FLAG, "whether init_from may be another network, of which what fits is taken"),
    "data.name": Key("cifar10", TEXT, "cifar10, digits, or any image set that TFDS or diffusion.data.folder prepared"),
    "data.data_dir": Key("", PLACE, 'where prepared sets lie; "": the default of TFDS, ~/tensorflow_datasets', FREE),
    "data.image_size": Key(0, SIDE, "N: the centre square of every picture is resized to N×N; 0: as it is"),
    "data.pad_to": Key(0, SIDE, "N: black is added around every picture up to N×N; 0: none"),
    "data.decode": Key(
        "auto",
        one_of(*DECODE),
        "ahead: pictures are decoded once, into a file; on_the_fly: when needed; auto: ahead up to 64 GiB a split",
        FREE,
        before="ahead",
    ),
    "data.placement": Key(
        "auto", one_of("auto", "devices", "disk"), "of the training images; auto: by the devices' free memory", FREE
    ),
    "data.validation": Key(
        0, integer(-1), "training images set aside, which rank checkpoints; -1: a tenth, chosen picture by picture"
    ),
    "data.flip": Key(True, FLAG, "whether each training image is mirrored with probability ½"),
    "schedule.name": Key("linear", ALL_SCHEDULES, "the noise schedule"),
    "schedule.num_steps": Key(1000, integer(1, at_most=1_000_000), "T, the number of diffusion steps"),
    "model.network": Key("unet", Choice(NETWORKS, given=NETWORK_GIVEN), "its fields are the keys of its group"),
    "model.prediction": Key("eps", PREDICTIONS, "what the network predicts"),
    "model.variance": Key("fixed_large", TRAINED_VARIANCES, "variance of the reverse process"),
    "model.conditioning": Key("t", one_of("t", "gamma"), "the network's noise input; gamma is −log SNR"),
    "model.rescale_t": Key(False, FLAG, "whether the network is conditioned on t·1000/T in place of t"),
    "model.decoder": Key(
        "network", one_of(*reverse.DECODERS), "p(x_0 | x_1): the network's, or bayes, in proportion to q(x_1 | x_0)"
    ),
    "model.conditional": Key(False, FLAG, "whether the network takes the data's labels"),
    "model.label_dropout": Key(0.0, SHARE, "share of the training images whose label is left out; for guidance"),
    "objective.name": Key("simple", OBJECTIVES, "the loss"),
    "objective.weighting": Key("none", Choice(objectives.WEIGHTINGS, given=("p",)), "weights of the simple loss"),
    "objective.timesteps": Key("uniform", TIMESTEPS, "how t is drawn in training"),
    "optim.name": Key("adam", Choice(optimizer.OPTIMIZERS, given=("learning_rate",)), "the optimizer"),
    "optim.learning_rate": Key(2e-4, RATE, "peak learning rate"),
    "optim.warmup_steps": Key(5000, integer(0), "steps in which the learning rate rises from 0"),
    "optim.decay": Key("constant", DECAYS, "the learning rate after warm-up"),
    "optim.grad_clip": Key(1.0, CLIP, "largest norm of the network's gradient; a learned schedule is not clipped"),
    "ema.decay": Key(0.9999, SHARE, "decay of the exponential moving average of the parameters"),
    "ema.post_hoc": Key((), EMA_LENGTHS, "lengths of two averages that are kept, of which any other is composed"),
    "ema.length": Key(0.0, EMA_LENGTH, "length of the average that a trained run is scored with; 0: ema.decay", FREE),
    "train.num_steps": Key(800_000, integer(1), "training steps", LONGER),
    "train.batch_size": Key(128, integer(1), "images per step, over all devices"),
    "train.grad_accum": Key(1, integer(1), "microbatches into which a device's share of the batch is split", FREE),
    "train.steps_per_call": Key(10, integer(1), "steps per compiled call on accelerators; a CPU takes 1", FREE),
    "train.log_every": Key(100, integer(1), "steps between rows of metrics.jsonl", FREE),
    "train.loggers": Key(("tensorboard",), LOGGERS, "who gets the rows beside metrics.jsonl: tensorboard, wandb", FREE),
    "train.checkpoint_every": Key(5000, integer(1), "steps between checkpoints", FREE),
    "train.keep_checkpoints": Key(3, integer(1), "how many checkpoints are kept, besides the best", FREE),
    "train.validate_every": Key(0, integer(0), "steps between rows with val_loss; 0: at every checkpoint only", FREE),
    "train.patience": Key(
        0, integer(0), "validations in a row without a lower val_loss after which training stops; 0: never", FREE
    ),
    "train.sample_every": Key(50_000, integer(0), "steps between pictures of samples; 0: only at the end", FREE),
    "train.monitor_images": Key(256, integer(1), "validation images, at most, whose loss ranks checkpoints"),
    "train.monitor_decoder": Key(
        True, FLAG, "whether t = 1 has its share of that loss even if the images are fewer than the steps", before=False
    ),
    "train.skip_nonfinite": Key(
        0, integer(0), "updates with NaN or Inf that are left out before training stops", ABOVE_0
    ),
    "train.check_replicas_every": Key(
        1000, integer(0), "steps between checks that all devices hold equal states; 0: never", FREE
    ),
    "eval.num_images": Key(
        0, integer(-1), "of the test set, and as many of the training set; 0: all of the test set; -1: none", FREE
    ),
    "eval.batch_size": Key(256, integer(1), "pairs of image and t at a time, over all devices", FREE),
    "eval.protocol": Key(
        "exact",
        Choice(likelihood.PROTOCOLS),
        "ho2020: decoder CDF, number of images of the original code; nichol2021: that CDF; vdm2021: no clip, T = 1000 "
        "and ∞",
        FREE,
    ),
    "eval.likelihood": Key("bound", LIKELIHOODS, "bound, importance(samples=64) or ode(probes=4), a density", FREE),
    "eval.variance": Key("model", FOR_A_TRAINED_MEAN, "variance that is scored; model: as trained", FREE),
    "eval.terms_per_image": Key(0, TERMS, "terms of the bound; a few give an estimate with its standard error", FREE),
    "eval.noises_per_term": Key(1, integer(1), "draws of ε in each term of the bound; several show their error", FREE),
    "sample.num_images": Key(64, integer(0), "how many images are drawn; 0: none, also during training", FREE),
    "sample.num_previews": Key(64, integer(1), "how many of the drawn images the grid shows", FREE),
    "sample.batch_size": Key(256, integer(1), "images at a time, over all devices", FREE),
    "sample.method": Key("ancestral", METHODS, "the sampler; for few steps dpm_solver_pp, unipc or heun", FREE),
    "sample.num_steps": Key(0, integer(0), "steps of the sampler, placed by sample.grid; 0: all", FREE),
    "sample.grid": Key("even", GRIDS, "the steps' places: even in 1…T, or by log SNR (log_snr, karras)", FREE),
    "sample.variance": Key("model", FOR_A_TRAINED_MEAN, "variance of ancestral sampling; model: as trained", FREE),
    "sample.labels": Key((), LABELS, "labels of a conditional network's images, in turn; (): every class", FREE),
    "sample.guidance": Key(0.0, GUIDANCE, "w of (1 + w) ε − w ε', ε' of no label or of sample.guide; 0: none", FREE),
    "sample.guide": Key("", PLACE, 'autoguidance by a worse model: an export, DIR, DIR@best, DIR@STEP; "": none', FREE),
    "sample.guidance_interval": Key((), INTERVAL, "(low, high): guidance only where low < t ≤ high", FREE),
    "quality.num_images": Key(10_000, integer(2), "samples that are scored; published distances take 50,000", FREE),
    "quality.features": Key(
        "pixels",
        Choice(quality.FEATURES, given=("train_set", "batch_size")),
        "what images are compared by; inception gives FID, classifier takes the data's own labels",
        FREE,
    ),
    "quality.reference": Key("train", REFERENCE, "what samples are compared with", FREE),
    "quality.every": Key(0, integer(0), "training steps between scores of samples; 0: never", FREE),
    "compress.batch_size": Key(
        64, integer(1, at_most=65_536), "images that the network sees at once; the file says it", FREE
    ),
    "compress.precision": Key(
        3, integer(0, at_most=10), "the latents' grid: 2^N steps to the smaller std of q and p; the file says it", FREE
    ),
}


def network_keys() -> dict[str, Key]:
    """The fields of every network as keys, such as `unet.channels`. A field that a config lacks has its default."""
    keys = {}
    for network, module in NETWORKS.items():
        helps = _helps(module)
        for field in dataclasses.fields(module):
            if field.name not in NETWORK_GIVEN:
                name, words = f"{network}.{field.name}", helps.get(field.name, "")
                keys[name] = Key(field.default, of_type(field.type), words, free=field.name == "remat")
    by_backend = one_of("auto", "xla", "winograd")
    for name in keys.keys() & {f"{network}.convolution" for network in NETWORKS}:
        keys[name] = Key("auto", by_backend, "of 3×3 kernels; auto: winograd on CPUs, else xla", FREE)
    return keys


def _helps(module: type[nn.Module]) -> dict[str, str]:
    """Field -> the first sentence about it in the class's docstring, under "Attributes:"."""
    _, _, attributes = inspect.getdoc(module).partition("Attributes:\n")
    entries = re.findall(r"^ +(\w+): (.*(?:\n {4,}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()).partition(". ")[0].rstrip(".") for name, text in entries}


def all_keys() -> dict[str, Key]:
    """Every key that a config may have."""
    return KEYS | network_keys()


def default_config() -> ConfigDict:
    """Every key at its default, locked. Only the default network's keys are included."""
    network = KEYS["model.network"].default
    own = {name: key for name, key in network_keys().items() if name.startswith(f"{network}.")}
    values = {name: key.default for name, key in (KEYS | own).items()}
    return ConfigDict(unflatten_dict(values, sep=".")).lock()


def unknown(name: str) -> str:
    """The error message about a key that does not exist."""
    near = difflib.get_close_matches(name, all_keys(), n=1)
    return f"config key {name} does not exist" + (f"; did you mean {near[0]}?" if near else "")
