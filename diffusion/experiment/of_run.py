"""A config file that returns the config of a run or an export. main.py uses it if one is named without --config."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.experiment import export, workdir


def get_config(directory: str) -> ConfigDict:
    """The config in config.json of the run in `directory`, or in model.json of an export.

    Raises the errors of `workdir.read_config` and `export.read`.
    """
    path = Path(directory)
    return export.read(path).config if export.is_export(path) else workdir.read_config(path)
