"""The config of a run, as a config file: main.py takes it where --workdir names a run and no --config is given."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.experiment import workdir


def get_config(directory: str) -> ConfigDict:
    """What config.json of the run in `directory` says. Raises what `workdir.read_config` does."""
    return workdir.read_config(Path(directory))
