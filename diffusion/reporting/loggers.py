"""Loggers by name: each sends the rows of metrics.jsonl to another place, such as TensorBoard.

`train.loggers` names entries. A logger is made when training starts or resumes, from the run's directory, its step and
its config. If the logger already has rows of later steps, they will be sent again. A logger that fails does not end the
run: metrics.jsonl has every row.
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

WANDB = "wandb.json"  # the id of the run at Weights & Biases, and the last step that was sent
FINISH_SECONDS = 30.0  # how long the end of training waits for an upload


def tensorboard(directory: Path, step: int, config: dict[str, Any]) -> Logger:
    """Writes curves and pictures to tensorboard/. TensorBoard hides the rows that will be sent again."""
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
    """Sends each row of metrics.jsonl and the pictures once to wandb.ai, or to wandb/ with WANDB_MODE=offline.

    When a run resumes, the run at Weights & Biases continues too. Rows up to `step` that it lacks are sent first.
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
    had = known["step"] if run.offline else run.starting_step - 1  # the server knows which rows arrived
    latest = had

    def write(step: int, row: dict[str, float]) -> None:
        nonlocal latest
        if step > had:
            # Written before the row is sent. Otherwise a run that is killed in between would send it twice.
            files.write_text(path, json.dumps(known | {"step": latest}) + "\n")
            run.log(row, step=step)  # the previous step is now complete; this one may still get pictures
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
NEEDS = {"wandb": "wandb"}  # logger -> the package that it imports; the extra has the same name


def check_installed(name: str) -> None:
    """Raises a ValueError if the package that a logger needs is not installed."""
    package = NEEDS.get(name)
    found = package and importlib.util.find_spec(package)
    if package and not (found and found.origin):  # W&B leaves a folder of that name, which is found without origin
        raise ValueError(
            f"train.loggers has {name}, which needs the package {package}: pip install -e '.[{package}]', or leave "
            f"{name} out"
        )


def together(makers: Mapping[str, Callable[[], Logger]]) -> Logger:
    """Joins several loggers into one. A logger that raises causes one warning and gets no more rows.

    Args:
        makers: name -> a function that makes the logger.
    """
    working: dict[str, Logger] = {}

    def attempt(name: str, action: Callable, *args: Any) -> Any:
        try:
            return action(*args)
        except Exception as error:  # of any kind, because a logger calls another package
            working.pop(name, None)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logging.warning("the logger %s failed (%s) and gets no more rows; metrics.jsonl has all rows", name, reason)

    def each(part: str, *args: Any) -> None:
        for name, logger in list(working.items()):
            attempt(name, getattr(logger, part), *args)

    for name, make in makers.items():
        if logger := attempt(name, make):
            working[name] = logger
    return Logger(*(functools.partial(each, part) for part in Logger._fields))
