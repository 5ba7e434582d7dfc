"""The gap between the variational bound and log p(x_0), and its causes: docs/bound_tightness.md.

    python -m experiments.bound_tightness --workdir=runs/bound_tightness [--run=runs/digits_fixed]

The parts are: Gaussian data, where the gap has a closed form; a 1-D mixture by quadrature, against T, schedule and
variance; the gap's two terms during the training of a model that is too small; and 2-D mixtures, against the covariance
and against the width of the network. With --run, the report also compares the bound, the importance-weighted bound and
the ODE likelihood of that run's checkpoint (needs the extra `ode`). Takes minutes on 2 CPU cores. Writes
bound_tightness.json, bound_tightness.md and line.png, terms.png, plane.png, capacity.png, trained.png into the working
directory.
"""

from pathlib import Path
from typing import Any

from diffusion import schedules
from diffusion.reporting import summary
from diffusion.runtime import files
from experiments import tables, tightness_capacity, tightness_known, tightness_plane, tightness_terms
from experiments.commands import argument_parser, exit_with


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where the results go")
    parser.add_argument("--run", type=Path, help="a run with a checkpoint, such as runs/digits_fixed")
    parser.add_argument("--checkpoint", default="latest", help="of --run: latest, best or a step")
    arguments = parser.parse_args()
    run(arguments.workdir, arguments.run, arguments.checkpoint)


def run(directory: Path, trained: Path | None, checkpoint: str = "latest") -> None:
    """Runs all parts, the trained network first, so that an error in it shows before the rest is computed."""
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": summary.device_name(), "versions": summary.versions()}
    text = []
    if trained is not None:
        from experiments import tightness_trained  # needs diffrax, the other parts do not

        results["trained"] = tightness_trained.measure(trained, checkpoint)
        tightness_trained.plot(directory / "trained.png", results["trained"])
        text.append(trained_table(results["trained"]))
    results["gaussian"] = tightness_known.gaussian_rows()
    results["line"], results["looseness"] = tightness_known.line_rows(), tightness_known.looseness_rows()
    results["slopes"] = tightness_known.slopes(results["line"])
    tightness_known.plot_line(directory / "line.png", results["line"], results["looseness"])
    schedule = schedules.cosine(10)
    results["targets"] = [tightness_known.line_targets(schedule, shift) for shift in (0.0, 0.1)]
    results["terms"], results["terms_gaussian"] = tightness_terms.rows(), tightness_terms.gaussian_row()
    tightness_terms.plot(directory / "terms.png", results["terms"])
    results["plane"] = tightness_plane.rows()
    tightness_plane.plot(directory / "plane.png", results["plane"])
    results["capacity"] = tightness_capacity.rows()
    tightness_capacity.plot(directory / "capacity.png", results["capacity"])
    text = [
        gaussian_table(results["gaussian"]),
        tightness_terms.table(results["terms"], results["terms_gaussian"]),
        tightness_plane.table(results["plane"]),
        tightness_capacity.table(results["capacity"]),
        *text,
    ]
    summary.write_json(directory / "bound_tightness.json", results)
    files.write_text(directory / "bound_tightness.md", "\n".join(text))
    print("\n".join(text))


def gaussian_table(rows: list[dict[str, Any]]) -> str:
    """The gap in closed form beside the measured one."""
    head = (
        "Gaussian data (2-D), exact mean, nats: bound − NLL with the exact variance, and the excess with a fixed one;\n"
        "each in closed form and measured ± one standard error.\n\n"
    )
    columns = ["schedule", "T", "exact: KL(q(x_T) ‖ N(0, I))", "measured"]
    columns += ["β̃: closed", "measured", "β: closed", "measured"]
    cells = []
    for row in rows:
        numbers = []
        for name in ("exact", *tightness_known.FIXED):
            cell = row[name]
            numbers += [f"{cell['closed']:.4f}", f"{cell['measured']:.4f} ± {cell['stderr']:.4f}"]
        cells.append([row["schedule"], str(row["num_steps"]), *numbers])
    return head + tables.markdown(columns, cells)


def trained_table(result: dict[str, Any]) -> str:
    """The likelihoods of one checkpoint, and the data and model of each."""
    from experiments import tightness_trained

    cells = []
    for name, (mean, stderr, difference, error) in tightness_trained.means(result).items():
        paired = "–" if name == "bound" else f"{difference:+.3f} ± {error:.3f}"
        cells.append([name, tightness_trained.ROWS[name], f"{mean:.3f} ± {stderr:.3f}", paired])
    lines = [
        f"{result['run']}, step {result['step']} (EMA), {len(result['image_numbers'])} test images, bits/dim:\n",
        tables.markdown(["likelihood", "of what", "bits/dim", "less the bound, paired"], cells),
    ]
    weighted = result["importance_weighted"]
    for image, number in enumerate(result["image_numbers"][: tightness_trained.NUM_FEW]):
        by_k = zip(weighted["k"], weighted["bpd"], strict=True)
        over_k = ", ".join(f"{bpd[image]:.4f} (K = {k})" for k, bpd in by_k)
        hutchinson = result["per_image_bpd"]["ode_dequantized"][image]
        lines.append(
            f"Test image {number}: importance-weighted {over_k}; ODE, dequantized: {hutchinson:.4f} by Hutchinson's "
            f"trace, {result['exact_trace_bpd'][image]:.4f} by the exact one.\n"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
