"""Where the rows of metrics.jsonl go as well: a table of names. Each makes a function of a step and a row.

`train.loggers` names entries. A logger is made when training starts or resumes, from the run's directory, the step
that it goes on from, and its config. Rows that it already has of later steps will come again. A logger that fails does
not end the run: metrics.jsonl has every row.
"""

import functools
import importlib.util
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion.reporting.metrics_log import Logger, Picture, read_metrics
from diffusion.reporting.summary import read_json
from diffusion.runtime import files

WANDB = "wandb.json"  # the id of the run at Weights & Biases, and the last step that it was given
FINISH_SECONDS = 30.0  # how long the end of training waits for an upload


def tensorboard(directory: Path, step: int, config: dict[str, Any]) -> Logger:
    """Curves and pictures in tensorboard/; it hides the rows that will come again."""
    from tensorboardX import SummaryWriter

    # Its thread ends when the disk is full; a short queue would then block the run forever.
    writer = SummaryWriter(str(directory / "tensorboard"), max_queue=10_000, purge_step=step + 1)

    def write(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    def images(step: int, name: str, picture: Picture) -> None:
        writer.add_image(name, picture, step, dataformats="HWC")

    return Logger(write, images, writer.close)


def weights_and_biases(
    directory: Path, step: int, config: dict[str, Any], project: str = "diffusion", entity: str = ""
) -> Logger:
    """Curves and pictures at wandb.ai, or in wandb/ with WANDB_MODE=offline: each row of metrics.jsonl once.

    The run there goes on where this one resumes; what it lacks of the rows up to `step` is sent first.
    """
    import wandb

    path = directory / WANDB
    known = read_json(path) or {"id": secrets.token_hex(4), "step": 0}
    files.write_text(path, json.dumps(known) + "\n")
    run = wandb.init(
        id=known["id"],
        resume="allow",
        project=project,
        entity=entity or None,
        name=directory.resolve().name,
        dir=str(directory),
        config=config,
        settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
    )
    had = known["step"] if run.offline else run.starting_step - 1  # the server knows which rows have arrived
    latest = had

    def write(step: int, row: dict[str, float]) -> None:
        nonlocal latest
        if step > had:
            # Before it is sent, or a run that is killed between the two would send it twice.
            files.write_text(path, json.dumps(known | {"step": latest}) + "\n")
            run.log(row, step=step)  # the step before is now complete; this one may get pictures yet
            latest = step

    def images(step: int, name: str, picture: Picture) -> None:
        if step > had:
            run.log({name: wandb.Image(picture)}, step=step)

    def close() -> None:
        files.write_text(path, json.dumps(known | {"step": latest}) + "\n")
        run.finish()

    for row in read_metrics(directory):
        if row["step"] <= step:
            write(row["step"], {name: value for name, value in row.items() if name != "step"})
    return Logger(write, images, close)


LOGGERS = {
    "tensorboard": tensorboard,
    "wandb": weights_and_biases,
}
NEEDS = {"wandb": "wandb"}  # logger -> the package that it imports, which is an extra of that name


def check_installed(name: str) -> None:
    """Raises a ValueError if the package that a logger needs is not installed."""
    package = NEEDS.get(name)
    found = package and importlib.util.find_spec(package)
    if package and not (found and found.origin):  # a folder of that name, such as W&B leaves, is found without origin
        raise ValueError(
            f"train.loggers has {name}, which needs the package {package}: pip install -e '.[{package}]', or leave "
            f"{name} out"
        )


def together(makers: Mapping[str, Callable[[], Logger]]) -> Logger:
    """One logger of several. One that raises is named once, in a warning, and gets nothing more.

    Args:
        makers: name -> a function that makes the logger.
    """
    working: dict[str, Logger] = {}

    def attempt(name: str, action: Callable, *args: Any) -> Any:
        try:
            return action(*args)
        except Exception as error:  # of any kind, because a logger is another package's code
            working.pop(name, None)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logging.warning("the logger %s failed (%s) and gets nothing more; metrics.jsonl has all rows", name, reason)

    def each(part: str, *args: Any) -> None:
        for name, logger in list(working.items()):
            attempt(name, getattr(logger, part), *args)

    for name, make in makers.items():
        if logger := attempt(name, make):
            working[name] = logger
    return Logger(*(functools.partial(each, part) for part in Logger._fields))
