"""The config of a run or an export, as a config file: main.py takes it where one is named and no --config is given."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.experiment import export, workdir


def get_config(directory: str) -> ConfigDict:
    """What config.json of the run in `directory` says, or model.json of an export.

    Raises what `workdir.read_config` and `export.read` do.
    """
    path = Path(directory)
    return export.read(path).config if export.is_export(path) else workdir.read_config(path)
