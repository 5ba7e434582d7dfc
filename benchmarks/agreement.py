"""Do devices, number formats, steps per call and layer implementations agree, for equal weights, images and keys?

    python -m benchmarks.agreement                                          # on a GPU
    python -m benchmarks.agreement --size=tiny --batch-size=2 --steps=2     # on a CPU, without the GPU's rows

Every row compares two results: the largest difference and the root mean square of all differences, both over the root
mean square of the result that comes second. Float32 keeps 24 binary digits (1e-7), TF32 11 (5e-4) and bfloat16 8
(4e-3). A network of thirty layers adds up a few such errors.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from benchmarks import candidates, networks, timing
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.experiment import build
from diffusion.experiment.build import Experiment
from diffusion.networks import layers
from diffusion.runtime import devices
from diffusion.training import parallel, step
from experiments.commands import exit_with

NOT_MEASURED = "not measured here"
QUANTITIES = ("output", "loss", "gradient norm", "gradient")


def main() -> None:
    parser = timing.arguments(__doc__, "agreement")
    parser.add_argument("--size", choices=networks.SIZES, default="full")
    parser.add_argument("--batch-size", type=timing.count, default=16)
    parser.add_argument("--steps", type=timing.count, default=10, help="in one call, against as many calls of one step")
    args = parser.parse_args()
    rows = network_rows(args) + call_rows(args) + layer_rows(args)
    timing.finish(args.out, vars(args), rows)


def row(compared: str, quantity: str, found: PyTree, wanted: PyTree) -> dict[str, Any]:
    """The differences between two trees; None stands for a tree that this machine cannot compute."""
    largest = rms = NOT_MEASURED
    if found is not None and wanted is not None:
        difference, reference = flat(found) - flat(wanted), flat(wanted)
        size = np.sqrt(np.mean(reference**2))
        largest, rms = float(np.abs(difference).max() / size), float(np.sqrt(np.mean(difference**2)) / size)
    return {
        "compared": compared,
        "quantity": quantity,
        "largest difference / RMS": largest,
        "RMS difference / RMS": rms,
    }


def flat(tree: PyTree) -> np.ndarray:
    """All numbers of a tree."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def network_rows(args) -> list[dict[str, Any]]:
    """The network, its loss and the gradient on the CPU and on the accelerator, and in bfloat16."""
    here = jax.devices()[0]
    is_cpu = here.platform == "cpu"
    exact = results(args, "float32", "highest", here)
    on_cpu = exact if is_cpu else results(args, "float32", "highest", jax.devices("cpu")[0])
    default = None if is_cpu else results(args, "float32", "default", here)
    half = results(args, "bfloat16", "default", here)
    return [
        *rows_of("accelerator against CPU, float32, highest precision", None if is_cpu else exact, on_cpu),
        *rows_of("the same, default precision of products", default, on_cpu),
        *rows_of("bfloat16 against float32, on one device", half, exact),
    ]


def rows_of(compared: str, found: dict[str, PyTree] | None, wanted: dict[str, PyTree]) -> list[dict[str, Any]]:
    """A row for each quantity of `results`."""
    names = [name for name in QUANTITIES if name in wanted]
    return [row(compared, name, None if found is None else found[name], wanted[name]) for name in names]


def results(args, dtype: str, precision: str, device: jax.Device) -> dict[str, PyTree]:
    """The network's output for noise, and its mean loss for images, with dropout, and the gradient of the loss."""
    experiment = build.experiment(networks.config_of(args.size, dtype=dtype), networks.IMAGE_SHAPE, 256)
    training, random = experiment.training, np.random.default_rng(0)
    noise = random.standard_normal((args.batch_size, *networks.IMAGE_SHAPE), np.float32)
    t = random.integers(1, 1001, args.batch_size, np.int32)
    keys = jax.random.split(jax.random.key(0), args.batch_size)

    def compute(params, noise, images, t, keys):
        examples = step.Examples(to_unit(images, 256), None, t, jnp.ones(len(t)), keys)
        mean_loss = partial(step.mean_loss, training)
        (loss, _), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params, examples)
        output = training.network.apply({"params": params}, noise, t - 1)
        return {"output": output, "loss": loss, "gradient norm": optax.global_norm(gradient), "gradient": gradient}

    inputs = (dense_params(experiment), noise, random_images(args.batch_size), t, keys)
    with jax.default_matmul_precision(precision):
        return jax.device_get(jax.jit(compute)(*jax.device_put(inputs, device)))


def dense_params(experiment: Experiment) -> PyTree:
    """Random weights with which every layer affects the output. Initial weights are near zero in some layers."""
    random = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        numbers = random.standard_normal(shape.shape, np.float32)
        return numbers / np.sqrt(np.prod(shape.shape[:-1]), dtype=np.float32) if len(shape.shape) > 1 else 0.1 * numbers

    params = jax.tree.map(draw, experiment.abstract_state().params)
    return jax.tree_util.tree_map_with_path(lambda path, p: p + 1 if path[-1].key == "scale" else p, params)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *networks.IMAGE_SHAPE), np.uint8)


def call_rows(args) -> list[dict[str, Any]]:
    """A call of several steps against as many calls of one. The latter run twice, to see if they repeat exactly."""
    config = networks.config_of(args.size)
    config.train.batch_size = args.batch_size * jax.local_device_count()
    config.optim.warmup_steps = 0
    experiment = build.experiment(config, networks.IMAGE_SHAPE, 256)
    params = dense_params(experiment)
    state = step.initial_state(experiment.training, params, networks.IMAGE_SHAPE)
    batches = parallel.resident(Source("random", "train", random_images(64)))
    shape = (args.steps, experiment.training.batch_size)
    indices = np.random.default_rng(2).integers(0, 64, shape, np.int32)
    train_steps = parallel.train_steps(experiment.training, seed=0)

    def change(steps_per_call: int) -> PyTree:
        """The change of the parameters in training."""
        trained = devices.replicate(state)
        for start in range(0, args.steps, steps_per_call):
            trained, _ = train_steps(trained, batches(indices[start : start + steps_per_call]))
        return jax.tree.map(np.subtract, trained.host().params, params)

    with jax.default_matmul_precision("highest"):
        at_once, single, again = change(args.steps), change(1), change(1)
    what = f"change of the parameters after {args.steps} steps"
    return [
        row(f"a call of {args.steps} steps against {args.steps} calls of one, float32", what, at_once, single),
        row("the calls of one again", what, again, single),
    ]


def layer_rows(args) -> list[dict[str, Any]]:
    """The layers of candidates.py, and ours in the same number format, against ours in float32."""
    random, channels = np.random.default_rng(0), 128
    maps = 10 + random.standard_normal((args.batch_size, 16, 16, channels), np.float32)

    def standardize(centre):
        def of(h):
            centred, variance = centre(h, 32)
            return centred / jnp.sqrt(variance + 1e-6)

        return of

    wanted = value_and_vjp(standardize(layers.centre), maps)
    found = value_and_vjp(standardize(candidates.centre_in_one_pass), maps)
    rows = rows_of("group norm in one pass against two, mean 10 and deviation 1", found, wanted)

    heads = random.standard_normal((3, args.batch_size, 256, 1, 256), np.float32)
    rounded = jnp.asarray(heads, jnp.bfloat16)
    wanted = value_and_vjp(layers.attend, *rounded.astype(jnp.float32))
    ours = value_and_vjp(layers.attend, *rounded)
    has_cudnn = jax.default_backend() == "gpu"
    cudnn = value_and_vjp(candidates.attend_with_cudnn, *rounded) if has_cudnn else None
    return [
        *rows,
        *rows_of("attention, bfloat16 against float32", ours, wanted),
        *rows_of("cuDNN's attention, bfloat16, against float32", cudnn, wanted),
    ]


def value_and_vjp(fn, *inputs) -> dict[str, PyTree]:
    """The output of a layer, and its gradient for a random cotangent."""

    def compute(*inputs):
        value, vjp = jax.vjp(fn, *inputs)
        cotangent = jax.random.normal(jax.random.key(0), value.shape)  # the same one for every dtype
        return {"output": value, "gradient": vjp(cotangent.astype(value.dtype))}

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(compute)(*inputs))


if __name__ == "__main__":
    exit_with(main)
