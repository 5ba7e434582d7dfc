"""The figures of `exact_posterior`."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from diffusion.data import Source
from diffusion.reporting import pictures

EXACT, NETWORK = "exact posterior", "network"
COLORS = {EXACT: "tab:red", NETWORK: "tab:blue", "test images": "tab:gray"}
SHOWN = 14  # samples of each model in the figure


def plot_gap(path: Path, per_t: dict[str, dict], num_train: int, title: str) -> None:
    """The error of ε̂ per t of both models on both splits, and the effective number of training images."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    *gaps, effective = figure.subplots(1, 3)
    t = np.arange(1, len(per_t["train"][EXACT]["eps_mse"]["mean"]) + 1)
    for axes, (split, scored) in zip(gaps, per_t.items(), strict=True):
        for name in (EXACT, NETWORK):
            mean, stderr = (np.array(scored[name]["eps_mse"][key]) for key in ("mean", "stderr"))
            label = f"{name}: bound {scored[name]['bpd']['mean']:.2f} bits/dim"
            axes.semilogy(t, mean, ".-", color=COLORS[name], label=label)
            axes.fill_between(
                t, np.maximum(mean - 2 * stderr, mean / 10), mean + 2 * stderr, color=COLORS[name], alpha=0.25
            )
        axes.set(xlabel="t", ylabel=r"$\|\epsilon - \hat\epsilon\|^2$ per dimension", title=f"{split} images")
        # The exact error of training images falls to 0 near t = 0, and every error does near t = T.
        axes.set_ylim(1e-4, 200)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label=r"$\hat\epsilon = 0$")
        axes.legend(fontsize="small")
    for split, style in (("train", "-"), ("test", "--")):
        numbers = per_t[split][EXACT]["effective_images"]
        effective.semilogy(t, numbers["median"], style, color=COLORS[EXACT], label=f"{split}: median, 10–90%")
        effective.fill_between(t, numbers["p10"], numbers["p90"], color=COLORS[EXACT], alpha=0.15)
    effective.axhline(num_train, color="black", linewidth=0.8, linestyle=":", label=f"N = {num_train:,}")
    effective.set(xlabel="t", ylabel="effective number of training images", title="exp(entropy of the weights)")
    effective.legend(fontsize="small")
    for axes in (*gaps, effective):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def save_samples(
    path: Path,
    images: dict[str, UInt8[np.ndarray, "n h w c"]],
    neighbours: dict[str, tuple[np.ndarray, np.ndarray]],
    train_set: Source,
) -> None:
    """Draws, for each model, a row of its images above a row of their nearest training images."""
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    for panel, name in zip(figure.subfigures(len(images), 1), images, strict=True):
        index, rmse = neighbours[name]
        panel.suptitle(
            f"{name} (top) and the nearest training images (bottom); "
            f"RMS difference in pixel values of 0–{train_set.num_levels - 1}",
            fontsize="medium",
        )
        axes = panel.subplots(2, SHOWN)
        for k in range(SHOWN):
            pair = images[name][[k]], train_set.images(index[[k]])
            for axis, image in zip(axes[:, k], pair, strict=True):
                axis.imshow(pictures.image_grid(image, train_set.num_levels), cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
            axes[1, k].set_xlabel(f"{rmse[k]:.2f}")
    figure.savefig(path, dpi=100)


def plot_nearest(path: Path, neighbours: dict[str, tuple[np.ndarray, np.ndarray]], num_levels: int, title: str) -> None:
    """The distances of samples and test images to their nearest training images."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"RMS difference to the nearest training image (pixel values of 0–{num_levels - 1})",
        ylabel="share of the images below",
        title=title,
    )
    for name, (_, rmse) in neighbours.items():
        share = np.arange(1, len(rmse) + 1) / len(rmse)
        axes.step(
            np.concatenate([[0], np.sort(rmse)]),
            np.concatenate([[0], share]),
            where="post",
            color=COLORS[name],
            label=f"{name}: mean {rmse.mean():.2f}, {np.sum(rmse == 0)} of {len(rmse)} identical",
        )
    axes.set_xlim(left=-0.05)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=120)


def plot_cost(path: Path, costs: dict[str, Any], num_train: int, title: str) -> None:
    """Time and work of one denoising step per image, against the number of training images."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{title}; batch {costs['batch']}")
    panels = (("seconds", 1e3, "milliseconds per image and step"), ("flops", 1e-9, "GFLOP per image and step"))
    for axes, (key, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.loglog(costs["sizes"], scale * np.array(costs[f"exact_{key}"]), "o-", color=COLORS[EXACT], label=EXACT)
        axes.axhline(scale * costs[f"network_{key}"], color=COLORS[NETWORK], label=NETWORK)
        axes.axvline(num_train, color="black", linewidth=0.8, linestyle=":", label="this data set")
        axes.set(xlabel="number of training images N", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=120)
