"""python main.py --config=configs/cifar10.py [--workdir=runs/cifar10] [--mode=train|eval|sample|describe]"""

import importlib
import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_MODES = {"train": "train", "eval": "evaluate", "sample": "sample", "describe": "describe"}
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; --config.KEY=VALUE changes one key of it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; by default runs/ and the config's name.")
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do; train resumes by itself.")


def main(argv: list[str]) -> None:
    """Runs the mode; what is wrong with its input is one sentence and exit code 2."""
    logging.set_verbosity(logging.WARNING)  # TFDS, JAX and Orbax report each of their steps
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; every argument is a --flag=value")
        if _CONFIG.value is None:
            raise ValueError("no --config is given; for example --config=configs/digits.py")
        # Imported here because JAX takes seconds that --help should not cost.
        import jax

        from diffusion import config

        if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/diffusion/compiled"))
        config.check(_CONFIG.value)
        name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        mode = importlib.import_module(f"diffusion.{_MODES[_MODE.value]}")
        mode.run(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"))
    except (ValueError, OSError, FloatingPointError) as error:
        # An error that this project raised is a sentence for the user; any other keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(__file__), *(Path(__file__).parent / "diffusion").rglob("*.py")
        if not isinstance(error, OSError) and raised_in not in ours:
            raise
        _fail(error)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError, OSError) as error:
        from diffusion import config

        for argument in argv[1:]:
            key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
            if argument.lstrip("-").startswith("config.") and key not in config.KEYS:
                _fail(config.unknown(key))
        _fail(error)


def _fail(reason: Exception | str) -> None:
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
