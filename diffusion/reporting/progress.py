"""How much of a long job is done, and how long the rest will take."""

import sys

import jax
from tqdm import tqdm


class Progress(tqdm):
    """A progress bar with the time left, on process 0; a line every ten seconds if the output is not a terminal.

    Args:
        total: the number of units of the whole job.
        initial: how many of them were done before, by a run that was stopped.
        desc: what is being done, such as "train".
        unit: what is counted, such as "step".
    """

    def __init__(self, total: int, initial: int = 0, desc: str = "", unit: str = "step"):
        terminal = {"dynamic_ncols": True}
        log_file = {
            "mininterval": 10.0,
            "maxinterval": 10.0,
            "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
        }
        style = terminal if sys.stderr.isatty() else log_file
        super().__init__(total=total, initial=initial, desc=desc, unit=unit, disable=jax.process_index() > 0, **style)
