"""--mode=describe: prints a config's keys, and its network, work, memory and schedule in numbers, without training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import likelihood
from diffusion.experiment import build, config, memory, schema
from diffusion.experiment.build import Experiment
from diffusion.networks.network import Network
from diffusion.training import parallel


def run(config_dict: ConfigDict, _directory: Path) -> None:
    """Prints the description. No network is compiled and nothing is written."""
    parallel.check_batch_size(config_dict.train.batch_size, config_dict.train.grad_accum)
    described = build.describe_data(config_dict)
    experiment = build.experiment(config_dict, described.image_shape, described.num_levels, described.num_classes)
    shape = "×".join(map(str, described.image_shape))
    figures = {
        "data": f"{described.name}: {described.num_train:,} training and {described.num_test:,} test images",
        "  images": f"{shape}, {described.num_levels} pixel values",
        **label(experiment),
        **network(experiment, described.num_train),
        **schedule_figures(experiment),
    }
    print(config.to_json(config_dict))
    print(*keys(config_dict), sep="\n", end="\n\n")
    for name, value in figures.items():
        print(f"{name:<36}{value}")


def keys(config_dict: ConfigDict) -> list[str]:
    """A line for each key: value, default, whether it may change between the legs of a run, and its help."""
    values = config.flatten(config_dict)
    rows = [("key", "value", "default", "may change", "")] + [
        (name, repr(values.get(name, key.default)), repr(key.default), key.may_change, key.help)
        for name, key in schema.all_keys().items()
    ]
    return [f"{name:<30}{value:<20} {default:<20} {change:<12}{words}" for name, value, default, change, words in rows]


def label(experiment: Experiment) -> dict[str, str]:
    """The cost of the labels, if the bound is given them."""
    if not experiment.training.conditional:
        return {}
    num_classes = experiment.training.network.num_classes
    bpd = likelihood.label_bpd(num_classes, experiment.image_shape)
    return {"  a label": f"{bpd:.4f} bits/dim, which the bound given labels leaves out ({num_classes} classes)"}


def network(experiment: Experiment, num_train: int) -> dict[str, str]:
    """Parameters, work and memory of training on one device."""
    state = experiment.abstract_state()
    batch_size, local_size = experiment.training.batch_size, memory.local_batch(experiment)
    flops = forward_flops(experiment)
    which_images = "all training images" if memory.keeps_images(experiment, num_train) else "images under way"
    giga = {
        "parameters, EMA, Adam, gradients": memory.state_bytes(experiment) / 2**30,
        which_images: memory.data_bytes(experiment, num_train) / 2**30,
        "kept for the backward pass": memory.residual_bytes(experiment, local_size) / 2**30,
    }
    return {
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}",
        "forward pass": f"{flops / 1e9:.2f} GFLOP per image",
        "train step": f"{3 * flops * batch_size / 1e12:.2f} TFLOP for {batch_size} images (3 × forward)",
        "memory per device": f"at most {sum(giga.values()):.2f} GiB, for {local_size} images at a time",
    } | {f"  {name}": f"{size:.2f} GiB" for name, size in giga.items()}


def forward_flops(experiment: Experiment) -> float:
    """FLOPs of one image through the network, as XLA counts them. `networks/convolution.py` leaves one image to XLA."""
    network = Network(experiment.training.network, experiment.p.output_channels(experiment.image_shape[-1]))
    image = jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.float32)
    params, number = experiment.abstract_state().params, jax.ShapeDtypeStruct((1,), jnp.float32)
    given = {"labels": jax.ShapeDtypeStruct((1,), jnp.int32)} if experiment.training.conditional else {}
    with jax.default_device(jax.devices("cpu")[0]):  # accelerators do not count FLOPs before they compile
        return jax.jit(network).lower(params, image, number, **given).cost_analysis()["flops"]


def optimizer_flops(optimizer: optax.GradientTransformation, params: PyTree) -> float:
    """FLOPs of the optimizer in one step, as XLA counts them; `params` may be shapes."""
    state = jax.eval_shape(optimizer.init, params)
    with jax.default_device(jax.devices("cpu")[0]), jax.numpy_dtype_promotion("standard"):
        return jax.jit(optimizer.update).lower(params, state, params).cost_analysis()["flops"]


def schedule_figures(experiment: Experiment) -> dict[str, str]:
    """The signal left at both ends, and the cost of the two fixed variances for any network."""
    schedule, name = experiment.start_schedule, experiment.config.schedule.name
    if experiment.learns_schedule:
        name += ", before training"
    last = schedule[schedule.num_steps]
    ratio = np.asarray(schedule.log_beta_large - schedule.log_beta_tilde, np.float64)[2:]
    mismatch = np.sum(0.5 * (ratio + np.expm1(-ratio))) / np.log(2)
    prior = likelihood.prior_bpd(schedule, jnp.ones(experiment.image_shape))
    return {
        "schedule": f"{name}, T = {schedule.num_steps}",
        "  β_1, β_T": f"{schedule.beta[1]:.3g}, {last.beta:.3g}",
        "  log signal-to-noise at 1, T": f"{schedule.log_snr[1]:.2f}, {last.log_snr:.2f}",
        "  prior L_T if x_0² = 1": f"{prior:.3g} bits/dim",
        "  KL penalty of fixed_large": f"{mismatch:.5f} bits/dim over fixed_small, for a perfect mean",
    }
