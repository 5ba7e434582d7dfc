r"""Fixed against learned variances: the grid prediction × objective × variance × schedule × T × seed.

    python -m experiments.variance --base=configs/digits_fixed.py --workdir=runs/variance
    python -m experiments.variance --base=configs/cifar10.py --workdir=runs/v --objective=simple,vlb --seeds=5
    python -m experiments.variance --base=configs/cifar10.py --workdir=runs/v --report

Every axis takes a list of values with commas, such as --schedule="cosine,linear(beta_end=0.03)". Without a list, an
axis has the values of DEFAULT_AXES or else the base config's value. --set sets further keys for all cells: --set
train.num_steps=500 eval.num_images=1000. A pair that cannot be trained, such as the simple loss and a learned variance,
is left out, and the program says why. Each cell is a folder of the working directory with the run's log in log.txt. The
same command runs missing cells.

On a cluster, one cell per job (--list numbers the cells), and the report when all are done:

    sbatch --array=0-23 --gres=gpu:1 --time=24:00:00 \
        --wrap='python -m experiments.variance --base=configs/cifar10.py --workdir=runs/v --index=$SLURM_ARRAY_TASK_ID'
"""

from experiments import ho2020, sweep
from experiments.commands import exit_with
from experiments.results import FinishedRun, Target

DEFAULT_AXES = {
    "objective": ["simple", "hybrid", "vlb"],
    "variance": ["fixed_small", "fixed_large", "learned", "learned_range"],
    "seed": ["0", "1", "2"],
}


def target_by_config(run: FinishedRun) -> Target | None:
    """The published result for the run's settings on CIFAR-10, if there is one."""
    if run.config["data.name"].partition(":")[0] != "cifar10":
        return None
    # Ho et al.'s rows set the axes alone, so they also describe runs of another row's recipe.
    rows = [row for row in ho2020.ROWS if row.describes(run.config)]
    return max(rows, key=lambda row: len(row.recipe)).target if rows else None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    return sweep.run_grid(argv, __doc__, DEFAULT_AXES, target_by_config)


if __name__ == "__main__":
    exit_with(main)
