"""Memory, kernels and traffic of our programs as XLA compiles them for an accelerator, which need not be present.

    pip install -e '.[compilers]'
    python -m benchmarks.compiled                        # for an H200; two minutes of compilation a row
    python -m benchmarks.compiled --target="TPU v4"      # a quarter of an hour a row
    python -m benchmarks.compiled --target=H100 --configs folder64 imagenet64 celebahq256

XLA's compilers run without the device that they compile for. The programs are the complete ones of training and
sampling. Nothing is run: the figures are counts, and the times follow from the device's data sheet. On a GPU the
compiler chooses algorithms by timing them. Here it cannot, so matrix products and the workspace of libraries may
differ.
"""

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jaxtyping import PyTree

from benchmarks import networks, sampling, scaling, timing
from diffusion.experiment import build, memory
from diffusion.experiment.build import Experiment
from diffusion.programs import describe
from diffusion.runtime import devices
from diffusion.training import parallel
from experiments.commands import exit_with

# A card in the compiler's format: the data sheet's figures, and the versions of jax[cuda12]'s libraries. Both cards
# have the same chip; only the bandwidth and size of the memory and the name differ.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: %d l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: %d
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA %s"
"""
CARDS = {
    "H200": HOPPER % (4_800_000_000_000, 150_754_820_096, "H200"),
    "H100": HOPPER % (3_350_000_000_000, 85_028_896_768, "H100"),
}
TARGETS = (*scaling.DEVICES, scaling.Device("H100", 990e12, 3.35e12))
STEPS = 10  # training steps in a call, or sampling steps in a chain


class Program(NamedTuple):
    """A program to compile; `batch` is the total over all devices."""

    name: str
    batch: int
    devices: int = 1
    remat: bool = False


# The values of --configs, with the shape of their images.
SHAPES = {
    "folder64": (64, 64, 3),
    "imagenet64": (64, 64, 3),
    "celebahq256": (256, 256, 3),
    "lsun256": (256, 256, 3),
}
PROGRAMS = (
    Program("train step", 128),
    Program("train step", 512),
    Program("train step", 128, remat=True),
    Program("train step", 128, devices=4),
    Program("ancestral step", 256),
)


def main() -> None:
    parser = timing.arguments(__doc__, "compiled")
    parser.add_argument("--target", choices=[device.name for device in TARGETS], default="H200")
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(PROGRAMS)), default=[*range(len(PROGRAMS))])
    parser.add_argument("--configs", nargs="+", choices=SHAPES, help="compile these instead of the rows")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else a TPU's compiler asks a cloud server for its hardware
    try:
        topology(args.target, 1)
    except (NotImplementedError, RuntimeError) as error:
        parser.error(f"there is no compiler for {args.target} here ({error}); pip install -e '.[compilers]'")
    if args.configs:
        rows = [config_row(name, args.target) for name in args.configs]
    else:
        rows = [row(PROGRAMS[i], args.target) for i in args.rows]
    timing.finish(args.out, vars(args), rows)


def row(program: Program, target: str) -> dict[str, Any]:
    """The figures of one program, per device and step."""
    targets = topology(target, program.devices)
    config = networks.config_of("full", dtype="bfloat16", remat=program.remat)
    config.train.batch_size = program.batch
    experiment = build.experiment(config, networks.IMAGE_SHAPE, 256, on_cpu=False)
    lower = lower_training if program.name == "train step" else lower_sampling
    compiled = lower(experiment, program.batch // program.devices, targets).compile()
    passes = 1 if program.name != "train step" else 4 if program.remat else 3
    flops = passes * program.batch / program.devices * describe.forward_flops(experiment)
    held = compiled.memory_analysis()
    return {
        "program": program.name + (", remat" if program.remat else ""),
        "batch": program.batch,
        "devices": program.devices,
        "arguments, GiB": held.argument_size_in_bytes / 2**30,
        "beside them, GiB": held.temp_size_in_bytes / 2**30,
    } | limits(compiled, STEPS, flops, target)


def limits(compiled: jax.stages.Compiled, steps: int, flops: float, target: str) -> dict[str, Any]:
    """The time of one step if only memory or only arithmetic were the limit."""
    (device,) = (device for device in TARGETS if device.name == target)
    counted = (compiled.cost_analysis() or {}).get("bytes accessed")
    if counted is None:
        kernels, moved = (total / steps for total in work(compiled.as_text()))
    else:  # XLA's own count, which counts a loop's body once; a TPU's program has no kernels to count
        kernels, moved = "", counted
    return {
        "kernels": kernels,
        "GB read and written": moved / 1e9,
        "at full bandwidth, ms": 1e3 * moved / device.bandwidth,
        "TFLOP": flops / 1e12,
        "at full speed, ms": 1e3 * flops / device.flops,
    }


def config_row(name: str, target: str) -> dict[str, Any]:
    """One config's train step. It holds only the images of one call, as if they came from disk."""
    targets = topology(target, 1)
    config = importlib.import_module(f"configs.{name}").get_config()
    experiment = build.experiment(config, SHAPES[name], 256, on_cpu=False)
    steps, batch = config.train.steps_per_call, config.train.batch_size
    compiled = lower_training(experiment, batch, targets, steps, steps * batch).compile()
    kept = memory.residual_bytes(experiment, batch // config.train.grad_accum)
    held = compiled.memory_analysis()
    flops = (4 if config.unet.remat else 3) * batch * describe.forward_flops(experiment)
    return {
        "config": name,
        "batch": batch,
        "grad_accum": config.train.grad_accum,
        "remat": "yes" if config.unet.remat else "no",
        "arguments, GiB": held.argument_size_in_bytes / 2**30,
        "beside them, GiB": held.temp_size_in_bytes / 2**30,
        "together, GiB": (held.argument_size_in_bytes + held.temp_size_in_bytes) / 2**30,
        "state, gradient and what is kept, GiB, at most": (memory.state_bytes(experiment) + kept) / 2**30,
    } | limits(compiled, steps, flops, target)


def topology(target: str, count: int) -> list[jax.Device]:
    """`count` devices to compile for."""
    if target in CARDS:
        found = topologies.get_topology_desc(platform="cuda", target_config=CARDS[target], topology=f"1x1x{count}")
    else:
        bounds = {"chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "chip_config_name": "megacore"}
        found = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1", **bounds)
    return found.devices[:count]


def lower_training(
    experiment: Experiment,
    local_batch: int,
    targets: Sequence[jax.Device],
    steps: int = STEPS,
    num_images: int = 50_000,
) -> jax.stages.Lowered:
    """The call of the train loop on `num_images` images, by default all of CIFAR-10."""
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    images = jax.ShapeDtypeStruct((num_images, *experiment.image_shape), jnp.uint8)
    indices = jax.ShapeDtypeStruct((steps, local_batch), jnp.int32)
    arguments = on_all((seed, experiment.abstract_state(), images, None, indices), len(targets))
    return parallel.compiled_train_steps(experiment.training, targets).lower(*arguments)


def lower_sampling(
    experiment: Experiment, local_batch: int, targets: Sequence[jax.Device], steps: int = STEPS
) -> jax.stages.Lowered:
    """A chain of the ancestral sampler."""

    def spaced(params):
        return sampling.spaced(experiment.model(params), steps)

    model = jax.eval_shape(spaced, experiment.abstract_state().params)
    numbers = jax.ShapeDtypeStruct((local_batch,), jnp.int32)
    program = devices.on_each(sampling.chain(experiment, "ancestral"), targets)
    return program.lower(*on_all((model, numbers), len(targets)))


def on_all(tree: PyTree, count: int) -> PyTree:
    """The shapes of a copy for each device."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)


class Instruction(NamedTuple):
    """A line of a compiled program: name = shape operation(operands), rest."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    rest: str


LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "sufc" for bits in (8, 16, 32, 64, 128)}
# These name arrays and move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"}


def work(text: str) -> tuple[int, int]:
    """The number of kernels of a compiled program, and the bytes that they read and write, in every run of a loop.

    A kernel reads its operands and writes its result. Of an operand that is only sliced, it reads the slices.
    """
    computations = parse(text)

    def of(name: str) -> tuple[int, int]:
        instructions = computations[name]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        kernels = moved = 0
        for instruction in instructions:
            called = re.search(r"(?:calls|body|to_apply)=%?([\w.-]+)", instruction.rest)
            if instruction.operation in ("while", "call"):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
                inner_kernels, inner_moved = of(called[1])
                repeated = int(trips[1]) if trips else 1
                kernels, moved = kernels + repeated * inner_kernels, moved + repeated * inner_moved
            elif instruction.operation not in FREE and not instruction.operation.endswith("-done"):
                kernels, moved = kernels + 1, moved + num_bytes(instruction.shape)
                if instruction.operation == "fusion":
                    moved += sum(read_by_fusion(computations[called[1]]))
                else:
                    moved += sum(num_bytes(shapes[operand]) for operand in set(instruction.operands))
        return kernels, moved

    return of("ENTRY")


def parse(text: str) -> dict[str, list[Instruction]]:
    """The computations of a program by name; the one that is called is "ENTRY"."""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(("HloModule", " ")):
            instructions = computations[line.split()[0].lstrip("%")] = []
        elif found := LINE.match(line):
            name, shape, operation, operands, rest = found.groups()
            instructions.append(Instruction(name, shape, operation, re.findall(r"%([\w.-]+)", operands), rest))
    return computations


def read_by_fusion(instructions: list[Instruction]) -> Iterator[int]:
    """The bytes that a kernel reads of each operand."""

    def needed(array: Instruction, full: int) -> int:
        total = 0
        for user in instructions:
            if array.name not in user.operands:
                continue
            if user.operation in ("slice", "dynamic-slice", "gather"):
                total += num_bytes(user.shape)
            elif user.operation in ("bitcast", "convert"):
                total += needed(user, full)
            else:
                return full
        return min(total, full)

    for parameter in instructions:
        if parameter.operation == "parameter":
            yield needed(parameter, num_bytes(parameter.shape))


def num_bytes(shape: str) -> int:
    """The bytes of an array or a tuple of arrays, from its shape as XLA prints it."""
    total = 0
    for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        size = BITS.get(kind, 0) // 8
        for length in filter(None, dims.split(",")):
            size *= int(length)
        total += size
    return total


if __name__ == "__main__":
    exit_with(main)
