r"""The published tables of CIFAR-10: Ho et al. (2020), tables 1 and 2, and Nichol & Dhariwal (2021), table 2.

    python -m experiments.ho2020 --workdir=runs/ho2020
    python -m experiments.ho2020 --workdir=runs/ho2020-digits --scale=digits

At full size a row is 800,000 or 500,000 steps of 128 CIFAR-10 images, some 4e18 floating-point operations. With
--scale=digits the same settings train on the bundled digits as configs/digits_fixed.py says, with T/4 diffusion steps.
Only the order of the rows then compares with the papers' numbers.

    sbatch --array=0-11 --gres=gpu:1 --time=48:00:00 \
        --wrap='python -m experiments.ho2020 --workdir=runs/ho2020 --index=$SLURM_ARRAY_TASK_ID'

The numbers of Ho et al. are from the paper. The numbers of Nichol & Dhariwal are from three transcriptions of their
table, which agree, and not from the paper itself.
"""

from typing import Any, NamedTuple

from diffusion.experiment import config as config_lib
from diffusion.experiment import schema
from experiments import sweep
from experiments.commands import exit_with
from experiments.results import AXES, FinishedRun, Target

FULL_BASE, DIGITS_BASE = "configs/cifar10.py", "configs/digits_fixed.py"
DIGITS_T_DIVISOR = 4

# The differences to Ho et al.'s network and training in the published commands of Nichol & Dhariwal (2021), with the
# defaults of their code: improved-diffusion, README.md and script_util.py. By default, their AdamW has no weight decay,
# so it equals the Adam of configs/cifar10.py. The header of configs/imagenet64.py lists the remaining differences.
IMPROVED = {
    "unet.num_res_blocks": "3",
    "unet.num_heads": "4",
    "unet.attention_resolutions": "(16, 8)",
    "unet.scale_shift_norm": "True",
    "unet.norm_eps": "1e-5",
    "model.rescale_t": "True",
    "data.flip": "False",
    "optim.learning_rate": "1e-4",
    "optim.warmup_steps": "0",
    "optim.grad_clip": "0",
    "train.num_steps": "500_000",
}
IMPROVED_DROPOUT = {"linear": "0.1", "cosine": "0.3"}  # by the schedule


class PaperRow(NamedTuple):
    """A row of a published table: its values of the grid's axes, further changes of its recipe, and its result."""

    name: str
    axes: dict[str, str]
    recipe: dict[str, str]
    target: Target

    def cell(self, scale: str, seed: str, extra: dict[str, str]) -> sweep.Cell:
        """The row as a run, at full size or on digits."""
        axes, recipe, base = self.axes, self.recipe, FULL_BASE
        if scale == "digits":
            axes = axes | {"T": str(int(axes["T"]) // DIGITS_T_DIVISOR)}
            recipe, base = {}, DIGITS_BASE
        keys = {AXES[axis]: value for axis, value in (axes | {"seed": seed}).items()}
        return sweep.Cell(f"{self.name}-seed{seed}", base, keys | recipe | extra)

    def describes(self, config: dict[str, Any]) -> bool:
        """Whether a run with this config.json has the row's axes and recipe."""
        cell, known = self.cell("full", "0", {}), schema.all_keys()
        wanted = config_lib.flatten(cell.config())
        keys = cell.overrides.keys() - {"seed"}
        return all(config.get(key, known[key].when_absent) == wanted[key] for key in keys)


def _ho(prediction: str, objective: str, variance: str, **result: float) -> PaperRow:
    axes = {"prediction": prediction, "objective": objective, "variance": variance, "schedule": "linear", "T": "1000"}
    return PaperRow(f"ho2020-{prediction}-{objective}-{variance}", axes, {}, Target("Ho et al.", **result))


def _improved(schedule: str, num_steps: str, objective: str, test_bpd: float, fid: float) -> PaperRow:
    variance = "fixed_large" if objective == "simple" else "learned_range"
    axes = {"prediction": "eps", "objective": objective, "variance": variance, "schedule": schedule, "T": num_steps}
    target = Target("Nichol & Dhariwal", test_bpd=test_bpd, fid=fid)
    # Their L_vlb needs importance sampling of t by its losses (section 3.3); the other objectives draw t uniformly.
    recipe = IMPROVED | {"unet.dropout": IMPROVED_DROPOUT[schedule]}
    if objective == "vlb":
        recipe |= {"objective.timesteps": "loss_aware"}
    return PaperRow(f"improved-{schedule}-T{num_steps}-{objective}", axes, recipe, target)


ROWS = [
    # Ho et al. (2020), tables 1 and 2, as printed; bits/dim are upper bounds. Rows without a result were unstable.
    _ho("mean", "vlb", "learned", fid=23.69),
    _ho("mean", "vlb", "fixed_large", fid=13.22),
    _ho("mean", "simple", "fixed_large"),
    _ho("eps", "vlb", "learned"),
    _ho("eps", "vlb", "fixed_large", test_bpd=3.70, train_bpd=3.69, fid=13.51),
    _ho("eps", "simple", "fixed_large", test_bpd=3.75, train_bpd=3.72, fid=3.17),
    # Nichol & Dhariwal (2021), table 2, from three transcriptions that agree.
    _improved("linear", "1000", "simple", 3.73, 3.29),
    _improved("linear", "4000", "simple", 3.37, 2.90),
    _improved("linear", "4000", "hybrid", 3.26, 3.07),
    _improved("cosine", "4000", "simple", 3.26, 3.05),
    _improved("cosine", "4000", "hybrid", 3.17, 3.19),
    _improved("cosine", "4000", "vlb", 2.94, 11.47),
]


def target_by_name(run: FinishedRun) -> Target | None:
    """The result of the row that the run's folder is named after."""
    return next((row.target for row in ROWS if run.name.startswith(f"{row.name}-seed")), None)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = sweep.argument_parser(__doc__)
    parser.add_argument("--scale", choices=("full", "digits"), default="full", help="CIFAR-10, or the bundled digits")
    arguments = parser.parse_args(argv)
    extra = sweep.overrides(arguments.set)
    unique: dict[str, sweep.Cell] = {}
    for row in ROWS:
        for seed in dict.fromkeys(sweep.seeds(arguments, ["0"])):
            cell = row.cell(arguments.scale, seed, extra)
            unique.setdefault(str(sorted(cell.overrides.items())), cell)  # on digits two rows are the same run
    return sweep.execute(arguments, list(unique.values()), target_by_name)


if __name__ == "__main__":
    exit_with(main)
