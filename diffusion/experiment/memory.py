"""The device memory that training needs, and the error message if a device has less."""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion.experiment import build, names
from diffusion.experiment.build import Experiment
from diffusion.runtime import prefetch
from diffusion.training.step import Examples, mean_loss

KEPT_PART = 1 / 4  # of a device's free memory that training images may take
FREE_WHERE_UNKNOWN = 16 * 2**30  # bytes, for devices that do not report it, such as CPUs: 4 GiB of images are kept
CALLS_UNDER_WAY = 2 + prefetch.AHEAD  # one runs, one waits, and the batches of others are prepared


def state_bytes(experiment: Experiment) -> int:
    """The parameters, their EMA, the optimizer's state and the gradient, on every device."""
    state = experiment.abstract_state()
    return num_bytes((state, state.params))


def keeps_images(experiment: Experiment, num_images: int) -> bool:
    """Whether every device of this process keeps all training images, according to data.placement."""
    placement = experiment.config.data.placement
    if placement != "auto":
        return placement == "devices"
    free = min(_free_bytes(device.memory_stats() or {}) for device in jax.local_devices())
    return num_images * math.prod(experiment.image_shape) <= KEPT_PART * free


def _free_bytes(stats: dict[str, int]) -> int:
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else FREE_WHERE_UNKNOWN


def data_bytes(experiment: Experiment, num_images: int) -> int:
    """The training images as uint8, on every device: all of them, or those of the running calls."""
    if not keeps_images(experiment, num_images):
        per_step = experiment.training.batch_size // jax.device_count()
        num_images = CALLS_UNDER_WAY * build.plan(experiment.config).steps_per_call * per_step
    return num_images * math.prod(experiment.image_shape)


def local_batch(experiment: Experiment) -> int:
    """The number of images in the network of one device at a time."""
    return experiment.training.batch_size // jax.device_count() // experiment.training.grad_accum


def residual_bytes(experiment: Experiment, num_images: int) -> int:
    """The bytes that JAX would keep for the backward pass if XLA fused nothing: an upper estimate."""

    def backward(params, examples):
        def loss(params):
            return mean_loss(experiment.training, params, examples)[0]

        return jax.vjp(loss, params)[1]  # a pytree whose leaves are the kept arrays

    params = experiment.abstract_state().params
    examples = Examples(
        x0=jax.ShapeDtypeStruct((num_images, *experiment.image_shape), jnp.float32),
        labels=jax.ShapeDtypeStruct((num_images,), jnp.int32) if experiment.training.conditional else None,
        t=jax.ShapeDtypeStruct((num_images,), jnp.int32),
        weight=jax.ShapeDtypeStruct((num_images,), jnp.float32),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_images)),
    )
    return num_bytes(jax.eval_shape(backward, params, examples)) - num_bytes(params)


def num_bytes(tree: PyTree) -> int:
    """The bytes of all leaves together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def shortage_explained(
    experiment: Experiment, batch_key: str = "train.batch_size", num_train: int = 0
) -> Iterator[None]:
    """Turns a device's lack of memory into a one-line error.

    Args:
        experiment: the experiment that runs.
        batch_key: the config key of the number of images at a time.
        num_train: the number of training images.

    Raises:
        MemoryError: the message states the needed memory and the config keys that lower it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        group, _, key = batch_key.partition(".")
        batch_size = experiment.config[group][key]
        per_device = f"{-(-batch_size // jax.device_count())} images per device at a time; set {batch_key} lower"
        what = _training_need(experiment, num_train) if group == "train" else per_device
        raise MemoryError(f"a device is out of memory: {batch_key}={batch_size} is {what}") from error


def _training_need(experiment: Experiment, num_train: int) -> str:
    """The memory that training needs, and the keys that lower it. All but the last key may change during a run."""
    config, num_images = experiment.config, local_batch(experiment)
    network = names.parse(config.model.network).name
    # If the config has no group of the network's keys, its fields are in model.network, which may not change.
    has_keys = network in config and not getattr(experiment.training.network, "remat", True)
    keys = [f"{network}.remat=True"] if has_keys else []
    keys += ["train.grad_accum higher"] if num_images > 1 else []
    keys += ["data.placement=disk"] if num_train and keeps_images(experiment, num_train) else []
    data = f" and {data_bytes(experiment, num_train) / 2**30:.2f} GiB of training images" if num_train else ""
    return (
        f"{num_images} images per device at a time, which keep about "
        f"{residual_bytes(experiment, num_images) / 2**30:.2f} GiB for the backward pass, plus "
        f"{state_bytes(experiment) / 2**30:.2f} GiB of parameters, EMA, optimizer and gradients{data}; set "
        f"{', or '.join([*keys, 'train.batch_size lower (which needs another --workdir)'])}"
    )
