"""Trained models that come with the package, by name. They are exports in `diffusion/weights`, each with a card."""

from pathlib import Path

from diffusion.experiment import export, workdir

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def names() -> list[str]:
    """The names that `load` takes."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{export.ABOUT}"))


def load(name: str) -> workdir.LoadedRun:
    """Loads a trained model by name: `load("digits").model`. Nothing is downloaded.

    Raises:
        ValueError: there is no such model.
    """
    if name not in names():
        known = ", ".join(names()) or f"none: {WEIGHTS} is empty, so install the package again, from its repository"
        raise ValueError(f"there are no weights named {name!r}; the package has: {known}")
    return workdir.load(WEIGHTS / name)
