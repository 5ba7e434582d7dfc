"""A train step and a forward pass of Ho et al.'s network, beside the same weights in PyTorch.

    python -m benchmarks.train_step                                        # 35.7M parameters
    python -m benchmarks.train_step --size=small --batch-size=32
    python -m benchmarks.train_step --dtypes bfloat16 --batch-size=128     # on a GPU
    python -m benchmarks.train_step --dtypes bfloat16 --no-peer --arms plain one_pass_norm cudnn_attention single_steps

Both sides do the whole step: take images from the device, draw t and ε, noise, forward, backward, clip, Adam, EMA. The
PyTorch arms are eager, eager with channels_last, and torch.compile with channels_last; bfloat16 is autocast there. On a
GPU float32 may be multiplied as TF32 on both sides. The arms alternate, so ratios also hold on a busy machine. `--arms`
chooses among ours: see candidates.py.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import candidates, compiled, networks, sides, timing
from benchmarks.candidates import CANDIDATES
from benchmarks.networks import torch
from benchmarks.timing import Arm, Arms
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.experiment.build import Experiment
from diffusion.model import Model
from diffusion.runtime import devices
from diffusion.training import parallel
from diffusion.training.step import TrainState
from experiments.commands import exit_with


def main() -> None:
    parser = sides.arguments(__doc__, "train_step")
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=networks.SIZES, default="full")
    parser.add_argument("--batch-size", type=timing.count, default=8 if on_cpu else 128, help="on one device")
    parser.add_argument("--dropout", type=float, default=0.1)
    dtypes = ["float32"] if on_cpu else ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=dtypes)
    parser.add_argument("--steps-per-call", type=timing.count, default=1 if on_cpu else 10, help="for our arms")
    parser.add_argument("--arms", nargs="+", choices=CANDIDATES, default=["plain", "remat"], help="our arms")
    parser.add_argument("--no-peer", action="store_true", help="time only ours")
    args = parser.parse_args()
    if "cudnn_attention" in args.arms and (on_cpu or args.dtypes != ["bfloat16"]):
        parser.error("--arms cudnn_attention needs a GPU and --dtypes bfloat16")
    with tempfile.TemporaryDirectory() as cache:
        # A train step is compiled twice, to run it and to read its memory. The second time it comes from this cache.
        if not jax.config.jax_compilation_cache_dir:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for the processes that this one starts
            jax.config.update("jax_compilation_cache_dir", cache)
        rows, ratios = measured(args)
    timing.finish(args.out, vars(args), rows, **ratios)


def measured(args) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each arm, and for each kind of work the time of PyTorch's best arm divided by our best arm's."""
    costs, columns = sides.measured(args, our_arms, peer_arms if has_peer(args) else None)
    seconds = {name: cost.seconds / columns[name]["steps"] for name, cost in costs.items()}

    def of_a_step(name: str, _: np.ndarray) -> dict[str, Any]:
        rate = timing.quartiles(args.batch_size / seconds[name])
        return columns[name] | {"seconds": timing.quartiles(seconds[name]), "images/s": rate}

    ratios = {}
    for what in ("train step", "forward") if has_peer(args) else ():
        names = [name for name in costs if columns[name]["what"] == what]
        ours = [name for name in names if name.startswith("ours")]
        ratios[what] = timing.best_ratio(seconds, ours, [name for name in names if name not in ours])
    return timing.rows(costs, of_a_step), ratios


def has_peer(args) -> bool:
    return not args.no_peer and networks.has_peer(networks.diffusers)


def arm(call: Callable[[], Any], what: str, steps: int = 1, gigabytes: float | None = None) -> Arm:
    """An arm with the columns kind of work, steps in a call and GiB of temporaries."""
    return Arm(call, {"what": what, "steps": steps, "GiB": gigabytes})


def our_arms(args) -> Arms:
    """For every dtype, each candidate's step and the forward passes."""
    params = networks.peer(args.size, args.dropout)[0] if has_peer(args) else None
    arms = {}
    for dtype, name in itertools.product(args.dtypes, args.arms):
        candidate, suffix = CANDIDATES[name], "" if name == "plain" else f", {name}"
        config = networks.config_of(args.size, dtype=dtype, dropout=args.dropout, **candidate.unet)
        config.train.batch_size = args.batch_size * jax.local_device_count()
        experiment = build.experiment(config, networks.IMAGE_SHAPE, 256)
        state = experiment.initial_state()
        if params is not None:
            state = state.replace(params=params)
        with candidates.in_place(candidate):
            steps = candidate.steps_per_call or args.steps_per_call
            arms[f"ours, {dtype}{suffix}"] = stepper(experiment, state, steps)
            if name == "plain" or candidate.layers:
                forward = forward_pass(experiment.model(state.params), args.batch_size)
                arms[f"ours, forward, {dtype}{suffix}"] = forward
    return arms


def stepper(experiment: Experiment, state: TrainState, steps: int) -> Arm:
    """One compiled call of the train loop, which continues where the last one ended."""
    num_images = 50_000 if jax.default_backend() != "cpu" else 256
    batch_size, accelerators = experiment.training.batch_size, jax.local_devices()
    program = compiled.lower_training(experiment, batch_size // len(accelerators), accelerators, steps, num_images)
    gigabytes = gibibytes(program.compile())

    train_steps = parallel.train_steps(experiment.training, seed=0)
    batches = parallel.resident(Source("random", "train", random_images(num_images)))
    indices = np.random.default_rng(0).integers(0, num_images, (steps, batch_size), np.int32)
    batch, held = batches(indices), [devices.replicate(state)]

    def call() -> None:
        held[0], metrics = train_steps(held[0], batch)
        held[0].wait()
        metrics.wait()

    call()  # traced now, while the candidate is in place
    return arm(call, "train step", steps, gigabytes)


def forward_pass(model: Model, batch_size: int) -> Arm:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch_size, *networks.IMAGE_SHAPE), np.float32))
    t = jnp.zeros(batch_size)
    forward = jax.jit(lambda model, x, t: model.denoise(x, t)).lower(model, x, t).compile()

    def call() -> None:
        jax.block_until_ready(forward(model, x, t))

    return arm(call, "forward", gigabytes=gibibytes(forward))


def gibibytes(program: jax.stages.Compiled) -> float:
    """Temporary memory of a compiled program, beside its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes / 2**30


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *networks.IMAGE_SHAPE), np.uint8)


def peer_arms(args) -> Arms:
    """The same for PyTorch: eager, channels_last, torch.compile."""
    module = networks.peer(args.size, args.dropout)[1]
    arms = {}
    for dtype, name in itertools.product(args.dtypes, ("eager", "channels_last", "compile, channels_last")):
        network = copy_of(module, args.dropout)
        if "channels_last" in name:
            network = network.to(memory_format=torch.channels_last)
        if "compile" in name:
            network = torch.compile(network)
        step = networks.synchronized(peer_step(args, dtype, network))
        forward = networks.synchronized(peer_forward(args, dtype, network, "channels_last" in name))
        arms[f"PyTorch {name}, {dtype}"] = arm(step, "train step")
        arms[f"PyTorch {name}, forward, {dtype}"] = arm(forward, "forward")
    return arms


def copy_of(module, dropout: float):
    copy = networks.diffusers.UNet2DModel.from_config(module.config, dropout=dropout)
    copy.load_state_dict(module.state_dict())
    return copy.to(networks.device())


def autocast(dtype: str):
    return torch.autocast(networks.device(), torch.bfloat16, enabled=dtype == "bfloat16")


def peer_forward(args, dtype: str, network, channels_last: bool) -> Callable[[], Any]:
    x = torch.randn(args.batch_size, 3, 32, 32, device=networks.device())
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    t = torch.zeros(args.batch_size, device=networks.device())

    def forward() -> None:
        network.eval()
        with torch.no_grad(), autocast(dtype):
            network(x, t)

    return forward


def peer_step(args, dtype: str, network) -> Callable[[], Any]:
    """Ho et al.'s step as PyTorch writes it, with the fused Adam and the EMA in one call over all tensors."""
    place = networks.device()
    images = torch.tensor(random_images(256).transpose(0, 3, 1, 2).copy(), device=place)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=place), 0)
    params = list(network.parameters())
    ema = [param.detach().clone() for param in params]
    adam = torch.optim.Adam(params, lr=2e-4, fused=True)

    def step() -> None:
        network.train()
        x0 = images[torch.randint(len(images), (args.batch_size,), device=place)].float() / 127.5 - 1
        x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=place) < 0.5, x0.flip(3), x0)
        t = torch.randint(1000, (len(x0),), device=place)
        eps = torch.randn_like(x0)
        row = alpha_bar[t][:, None, None, None]
        x_t = row.sqrt() * x0 + (1 - row).sqrt() * eps
        with autocast(dtype):
            output = network(x_t, t).sample
        torch.nn.functional.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1e-4)

    return step


if __name__ == "__main__":
    exit_with(main)
