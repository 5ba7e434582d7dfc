"""--mode=export: writes a checkpoint as two files that need neither the run nor its data set."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.experiment import export, workdir
from diffusion.runtime import files, processes


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest", output: str = "") -> None:
    """Exports a checkpoint of `directory` to `output`. Raises the errors of `workdir.load` and `LoadedRun.export`."""
    loaded, out = workdir.load(directory, checkpoint, config), files.expanded(output)
    processes.on_first(lambda: loaded.export(out))
    if processes.is_first():
        kilobytes = (out / export.WEIGHTS).stat().st_size / 1000
        print(f"step {int(loaded.state.step):,} of {directory}: {kilobytes:,.0f} kB in {out}; see {export.ABOUT} there")
