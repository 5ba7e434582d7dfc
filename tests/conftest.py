"""Tests run on eight CPU devices, with checked shape annotations and no silent broadcasting or promotion."""

import dataclasses
import fcntl
import functools
import gc
import importlib.metadata
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # also where an accelerator is present: eight devices are assumed below
# JAX reads the number of devices when it is first imported, so this comes before any other import.
# Tests compile far more than they compute, so they compile without optimization: half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older code generator, which jaxlib 0.12 no longer has, takes half of what is left.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import matplotlib.figure  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

matplotlib.use("Agg")
# Equal programs compile once a session, also those of other workers, which inherit the name of the folder. It goes
# when the process that made it ends.
if "DIFFUSION_TESTS_COMPILED" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="diffusion-tests-")
    os.environ["DIFFUSION_TESTS_COMPILED"] = COMPILED.name
    # Classifiers and references are kept in the user's cache, which tests leave alone.
    os.environ["XDG_CACHE_HOME"] = f"{COMPILED.name}/cache"
jax.config.update("jax_compilation_cache_dir", os.environ["DIFFUSION_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion", "beartype.beartype")
gc.set_threshold(50_000, 20, 50)  # traces are made of many small objects that live long: a fifth of a trace's time

MAPPINGS = Path("/proc/self/maps")  # a line for each piece of the process's memory that the kernel keeps apart
TOO_MANY = 40_000  # Linux allows 65,530, and one file alone adds 17,000


@pytest.fixture(scope="module", autouse=True)
def no_more_programs_than_fit():
    """After each file JAX forgets its compiled programs if they are many.

    Each of their kernels has mappings of its own. Where the kernel allows no more, XLA's compiler crashes.
    """
    yield
    if not MAPPINGS.exists() or len(MAPPINGS.read_bytes().splitlines()) > TOO_MANY:
        jax.clear_caches()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """(name, make) -> a directory that `make` fills, once for all workers of a test session that need it."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def directory_of(name: str, make: Callable[[Path], None]) -> Path:
        directory, done = common / "made_once" / name, common / f"{name}.done"
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                directory.mkdir(parents=True, exist_ok=True)
                make(directory)
                done.touch()
        return directory

    return directory_of


@pytest.fixture(scope="session")
def tiny_data_dir(made_once) -> str:
    """A data directory of the tests' own, with the bundled digits."""
    from diffusion import data

    def prepare(directory: Path) -> None:
        data.load("digits", "train", str(directory))

    return str(made_once("digits", prepare))


@pytest.fixture(scope="session")
def layer() -> None:
    """Makes the networks of toy.py, of one layer, choices for model.network."""
    import toy

    toy.register()


@pytest.fixture(scope="module")
def steps_compiled_once(layer):
    """Of equal runs of the toy, only the first of a file compiles its train steps."""
    import toy

    from diffusion.training import parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "experiment", functools.cache(toy.experiment))
        patch.setattr(parallel, "train_steps", functools.cache(parallel.train_steps))
        yield


@pytest.fixture(scope="module")
def programs_compiled_once(layer):
    """Of equal runs, only the first of a file traces and compiles its train steps and its sampler."""
    from diffusion.evaluation import sampling
    from diffusion.experiment import build, rules
    from diffusion.experiment import config as config_lib
    from diffusion.programs import sample
    from diffusion.training import parallel

    make, made = build.experiment, {}
    of_plan = {f"train.{field.name}" for field in dataclasses.fields(build.loop.Plan)}
    of_plan -= {"train.num_steps", "train.skip_nonfinite"}  # the train step depends on these

    def of_training(key):
        return key not in of_plan and not key.startswith(("eval.", "sample.", "quality.", "compress."))

    def experiment(config, *arguments, **keys):
        if config.init_from:  # what lies there may change
            return make(config, *arguments, **keys)
        flat = {key: value for key, value in config_lib.flatten(config).items() if of_training(key)}
        equal = json.dumps(flat), arguments, tuple(keys.items())
        if equal not in made:
            made[equal] = make(config, *arguments, **keys)
        config_lib.check(config)
        rules.check(config)
        return dataclasses.replace(made[equal], config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "experiment", experiment)
        patch.setattr(parallel, "train_steps", functools.cache(parallel.train_steps))
        patch.setattr(sample, "Sampler", functools.cache(sampling.Sampler))
        yield


@pytest.fixture(scope="session", autouse=True)
def each_kind_of_figure_is_drawn_once():
    """Matplotlib takes a third of a second for one. Later figures of a function are the bytes of its first.

    Yields a list of files whose figures are all drawn.
    """
    draw, drawn, exempt = matplotlib.figure.Figure.savefig, {}, []

    def savefig(figure, file, **options):
        frame = sys._getframe(1)
        kind = frame.f_code, frame.f_back.f_code
        if kind not in drawn or exempt:
            buffer = io.BytesIO()
            draw(figure, buffer, **options)
            drawn[kind] = buffer.getvalue()
        if hasattr(file, "write"):
            file.write(drawn[kind])
        else:
            Path(file).write_bytes(drawn[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
        yield exempt


@pytest.fixture
def every_figure(each_kind_of_figure_is_drawn_once):
    """Every figure of the test is drawn."""
    each_kind_of_figure_is_drawn_once.append(True)
    yield
    each_kind_of_figure_is_drawn_once.pop()


@pytest.fixture(scope="session")
def tiny(tiny_data_dir, layer):
    """A function of changes, tiny(train__batch_size=8): a config of the digits whose every part is real and small.

    The network is one layer, which compiles in a third of the time of the smallest U-Net.
    """
    from configs import digits_fixed

    small = {
        "model.network": "layer", "data.data_dir": tiny_data_dir, "data.flip": True, "schedule.num_steps": 6,
        "unet.channels": 8, "unet.channel_mult": (1,), "unet.num_res_blocks": 1, "unet.num_groups": 4,
        "unet.dropout": 0.1, "unet.attention_resolutions": (), "unet.mid_attention": False, "unet.fourier_features": (),
        "train.batch_size": 16, "train.num_steps": 6, "train.log_every": 2, "train.checkpoint_every": 3,
        "train.sample_every": 4, "eval.num_images": 20, "eval.batch_size": 16, "sample.num_images": 9,
        "optim.warmup_steps": 2,
    }  # fmt: skip

    def config_with(**changes):
        config = digits_fixed.get_config()
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        with config.unlocked():
            config.update_from_flattened_dict(small | dotted)
        return config

    return config_with


@pytest.fixture(scope="session")
def straight(made_once, tiny) -> Path:
    """The working directory of the tiny run, which was never stopped. Do not write into it."""
    from diffusion.programs import train

    def run(directory: Path) -> None:
        train.run(tiny(), directory)

    return made_once("straight", run)


@pytest.fixture(scope="session")
def conditional(tiny):
    """As `tiny`, with dropout and with labels, of which some are left out in training."""

    def config_with(**changes):
        labels = {"model__network": "labelled", "model__conditional": True, "model__label_dropout": 0.3}
        labels |= {"optim__learning_rate": 0.05}
        return tiny(**labels | {"data__flip": False, "sample__num_images": 15, "eval__num_images": 7} | changes)

    return config_with


@pytest.fixture(scope="session")
def labelled_run(made_once, conditional) -> Path:
    """The working directory of the tiny run with labels. Do not write into it."""
    from diffusion.programs import train

    return made_once("labelled", lambda directory: train.run(conditional(), directory))


@pytest.fixture(scope="session")
def vdm(tiny):
    """As `tiny`, in continuous time: the ends of γ are learned, the network is told γ, the decoder is Bayes' rule."""

    def config_with(**changes):
        learned = "learned(start='linear_gamma(gamma_min=-7.0)', inner='second_moment')"
        process = {"schedule__name": learned, "schedule__num_steps": 30}
        model = {"model__variance": "fixed_small", "model__decoder": "bayes", "model__conditioning": "gamma"}
        train = {"objective__name": "vdm_continuous", "train__sample_every": 0, "eval__num_images": 16}
        return tiny(**process | model | train | changes)

    return config_with


@pytest.fixture(scope="session")
def vdm_run(made_once, vdm) -> Path:
    """The working directory of the tiny run in continuous time. Do not write into it."""
    from diffusion.programs import train

    return made_once("vdm", lambda directory: train.run(vdm(), directory))
