"""Pictures of draws."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from rtb_inverse.diagnostics import Coverage


def image_grid(images: Tensor, file: str | Path, columns: int = 16, limits: tuple[float, float] = (-1.0, 1.0)) -> None:
    """Write a grid of images (M, C, H, W), C of 1 or 3, values within `limits`."""
    M, C, H, W = images.shape
    rows = -(-M // columns)
    canvas = torch.full((rows * columns, C, H + 1, W + 1), float(limits[1]))
    canvas[:M, :, :H, :W] = images.cpu()
    canvas = canvas.reshape(rows, columns, C, H + 1, W + 1).permute(0, 3, 1, 4, 2).reshape(rows * (H + 1), columns * (W + 1), C)
    fig, ax = plt.subplots(figsize=(columns * 0.6, rows * 0.6), dpi=120)
    _show(ax, canvas.permute(2, 0, 1), limits)
    fig.tight_layout(pad=0.2)
    fig.savefig(file)
    plt.close(fig)


def own_limits(images: Tensor, limits: tuple[float, float]) -> tuple[float, float]:
    """`limits`, or, of images that go beyond them by a tenth of their width, the 2 % and 98 % quantiles."""
    known, margin = images[~images.isnan()].double(), 0.1 * (limits[1] - limits[0])
    low, high = (float(known.quantile(q)) for q in (0.02, 0.98)) if known.numel() else limits
    return limits if low >= limits[0] - margin and high <= limits[1] + margin else (low, high)


def posterior_panel(
    observed: Tensor,
    mean: Tensor,
    std: Tensor,
    draws: Tensor,
    file: str | Path,
    truth: Tensor | None = None,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> None:
    """One row per observation: truth, what was observed, posterior mean, posterior standard deviation, draws.

    Args:
        observed: (B, C, H, W), NaN where nothing was seen; shown within limits of its own where it goes far beyond those of x.
        mean, std, truth: (B, C, H, W). draws: (N, B, C, H, W).
    """
    columns = [("truth", truth, limits)] if truth is not None else []
    columns += [("observed", observed, own_limits(observed, limits)), ("mean", mean, limits)]
    columns.append(("std", std, (0.0, float(std.max()) or 1.0)))
    columns += [(f"draw {i + 1}", draw, limits) for i, draw in enumerate(draws)]
    fig, axes = plt.subplots(len(mean), len(columns), figsize=(1.05 * len(columns), 1.05 * len(mean) + 0.3), dpi=120, squeeze=False)
    for row, line in enumerate(axes):
        for ax, (title, images, bounds) in zip(line, columns, strict=True):
            _show(ax, images[row], bounds, "magma" if title == "std" else "gray")
            if row == 0:
                ax.set_title(title, fontsize=9)
    fig.tight_layout(pad=0.3)
    fig.savefig(file)
    plt.close(fig)


def vector_panel(draws: Tensor, file: str | Path, truth: Tensor | None = None) -> None:
    """One picture per observation. Where x has one element: a histogram. Two: a scatter of draws, their mean with one standard
    deviation, the truth. Else, element by element: draws, their mean with a band of two standard deviations, the truth.

    Args:
        draws: (N, B, *shape). truth: (B, *shape).
    """
    N, B = draws.shape[:2]
    flat = draws.detach().double().cpu().reshape(N, B, -1)
    known = None if truth is None else truth.detach().double().cpu().reshape(B, -1).numpy()
    columns = min(B, 3)
    rows = -(-B // columns)
    fig, grid = plt.subplots(rows, columns, figsize=(3.0 * columns, 2.6 * rows + 0.4), dpi=120, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat[B:]:
        ax.set_visible(False)
    for b, ax in enumerate(grid.flat[:B]):
        x, mean, std = flat[:, b].numpy(), flat[:, b].mean(0).numpy(), flat[:, b].std(0, correction=int(N > 1)).numpy()
        if x.shape[1] == 2:
            ax.scatter(*x.T, s=6, alpha=0.5, lw=0, color="C0", label="draws")
            ax.errorbar(*mean[:, None], yerr=std[1], xerr=std[0], color="C1", fmt="o", ms=4, capsize=2, label="mean ± std")
            if known is not None:
                ax.plot(*known[b, :, None], "k*", ms=10, mec="w", label="truth")
        elif x.shape[1] == 1:
            ax.hist(x[:, 0], bins=30, color="C0", alpha=0.5, label="draws")
            ax.axvline(mean[0], color="C1", label="mean")
            if known is not None:
                ax.axvline(known[b, 0], color="k", ls="--", label="truth")
        else:
            i, marker = range(x.shape[1]), "." if x.shape[1] < 32 else ""
            ax.plot(i, x[:16].T, color="C0", alpha=0.3, lw=0.7, marker=marker, ms=3, label=["draws"] + ["_"] * (min(N, 16) - 1))
            ax.fill_between(i, mean - 2 * std, mean + 2 * std, color="C1", alpha=0.2, lw=0)
            ax.plot(i, mean, color="C1", lw=1.3, marker=marker, label="mean ± 2 std")
            if known is not None:
                ax.plot(i, known[b], color="k", lw=1, ls="--", marker=marker, label="truth")
            if x.shape[1] < 12:
                ax.set_xticks(list(i))
        ax.set_title(f"observation {b + 1}", fontsize=9)
    names = {1: ("value", "draws"), 2: ("first element", "second element")}.get(flat.shape[-1], ("element", "value"))
    for ax in grid[-1]:
        ax.set_xlabel(names[0])
    for ax in grid[:, 0]:
        ax.set_ylabel(names[1])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncols=3, fontsize=8, frameon=False)
    fig.tight_layout(pad=0.5, rect=(0, 0, 1, 1 - 0.3 / fig.get_figheight()))
    fig.savefig(file)
    plt.close(fig)


def calibration_figure(log_w: Tensor, file: str | Path, ranks: Tensor | None = None, coverage: Coverage | None = None) -> None:
    """Path weights (N, B), and where they are known the ranks of the truth (B, statistics) among N draws, and expected coverage."""
    panels = 1 + (ranks is not None) + (coverage is not None)
    fig, grid = plt.subplots(1, panels, figsize=(3.4 * panels, 3.0), dpi=120, squeeze=False)
    axes = list(grid[0])
    n = len(log_w)
    if coverage is not None:
        ax = axes.pop(0)
        levels = coverage.levels.cpu().numpy()
        error = 2 * (levels * (1 - levels) / log_w.shape[1]) ** 0.5
        band = (levels - error).clip(0), (levels + error).clip(0, 1)
        ax.fill_between(levels, *band, color="0.85", lw=0, label="calibrated, 2 std. errors")
        ax.plot(levels, coverage.coverage.cpu().numpy(), label=f"draws (p = {coverage.p_value:.2g})")
        ax.plot([0, 1], [0, 1], "k:", lw=1)
        ax.set(xlabel="credibility level", ylabel="expected coverage", title="coverage curve (TARP)")
        ax.legend(fontsize=7)
    if ranks is not None:
        ax = axes.pop(0)
        bins = min(n + 1, 20)
        ax.hist(((ranks.flatten().cpu() + 0.5) / (n + 1)).numpy(), bins=bins, range=(0, 1), density=True)
        ax.axhline(1, color="k", ls=":", lw=1)
        ax.set(xlabel="rank of the truth among the draws", ylabel="density", title="rank histogram")
    ax = axes.pop(0)
    ax.hist((log_w - log_w.max(0).values).flatten().clamp_min(-50).cpu().numpy(), bins=50)
    ax.set(xlabel="log weight below the largest", ylabel="draws", title="path weights")
    fig.tight_layout(pad=0.5)
    fig.savefig(file)
    plt.close(fig)


def bounds_figure(curve: list[dict], file: str | Path) -> None:
    """Evidence bounds with two standard errors against optimiser steps: `BoundsOverTraining.curve`."""
    fig, ax = plt.subplots(figsize=(5.2, 3.4), dpi=120)
    labels = {"eubo": ("EUBO", "C1", "v-"), "elbo": ("ELBO", "C0", "^-"), "elbo_on_policy": ("ELBO, training's own paths", "0.45", "s")}
    for name, (label, colour, line) in labels.items():
        points = [(p["step"], p[name]["value"], 2 * (p[name]["error"] or 0)) for p in curve if p.get(name, {}).get("value") is not None]
        if points:
            steps, values, errors = zip(*points, strict=True)
            ax.errorbar(steps, values, errors, fmt=line, color=colour, ms=4, lw=1.2, capsize=2, label=label)
    ax.set(xlabel="optimiser steps", ylabel="nats", title="evidence bounds over training")
    ax.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # below, clear of the error bars
    fig.tight_layout(pad=0.5)
    fig.savefig(file)
    plt.close(fig)


def _show(ax, image: Tensor, limits: tuple[float, float], cmap: str = "gray") -> None:
    image = image.detach().float().cpu()
    colours = plt.get_cmap(cmap).with_extremes(bad="#c8b89a")
    if len(image) != 3 or cmap != "gray":
        ax.imshow(image.mean(0), cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    else:
        scaled = ((image - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
        ax.imshow(scaled.permute(1, 2, 0).nan_to_num(0.75), interpolation="nearest")  # unseen pixels of a colour image are grey
    ax.set_xticks([])
    ax.set_yticks([])
