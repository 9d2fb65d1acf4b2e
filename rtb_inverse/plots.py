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
        observed: (B, C, H, W), NaN where nothing was seen.
        mean, std, truth: (B, C, H, W). draws: (N, B, C, H, W).
    """
    columns = ([("truth", truth, limits)] if truth is not None else []) + [("observed", observed, limits), ("mean", mean, limits)]
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


def calibration_figure(log_w: Tensor, file: str | Path, ranks: Tensor | None = None, coverage: Coverage | None = None) -> None:
    """Path weights (N, B), and where they are known the ranks of the truth (B, statistics) among N draws, and expected coverage."""
    panels = 1 + (ranks is not None) + (coverage is not None)
    fig, grid = plt.subplots(1, panels, figsize=(3.4 * panels, 3.0), dpi=120, squeeze=False)
    axes = list(grid[0])
    n = len(log_w)
    if coverage is not None:
        ax = axes.pop(0)
        levels = coverage.levels.cpu().numpy()
        error = (levels * (1 - levels) / log_w.shape[1]) ** 0.5
        ax.fill_between(levels, levels - 2 * error, levels + 2 * error, color="0.85", label="two standard errors")
        ax.plot(levels, coverage.coverage.cpu().numpy(), label=f"draws (p = {coverage.p_value:.2g})")
        ax.plot([0, 1], [0, 1], "k:", lw=1)
        ax.set(xlabel="credibility level", ylabel="expected coverage", title="TARP")
        ax.legend(fontsize=7)
    if ranks is not None:
        ax = axes.pop(0)
        bins = min(n + 1, 20)
        ax.hist(((ranks.flatten().cpu() + 0.5) / (n + 1)).numpy(), bins=bins, range=(0, 1), density=True)
        ax.axhline(1, color="k", ls=":", lw=1)
        ax.set(xlabel="rank of the truth among the draws", ylabel="density", title="calibration")
    ax = axes.pop(0)
    ax.hist((log_w - log_w.max(0).values).flatten().clamp_min(-50).cpu().numpy(), bins=50)
    ax.set(xlabel="log weight below the largest", ylabel="draws", title="path weights")
    fig.tight_layout(pad=0.5)
    fig.savefig(file)
    plt.close(fig)


def _show(ax, image: Tensor, limits: tuple[float, float], cmap: str = "gray") -> None:
    image = image.detach().float().cpu()
    colours = plt.get_cmap(cmap).with_extremes(bad="#c8b89a")
    if len(image) == 1 or cmap != "gray":
        ax.imshow(image.mean(0), cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    else:
        scaled = ((image - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
        ax.imshow(scaled.permute(1, 2, 0).nan_to_num(0.75), interpolation="nearest")  # unseen pixels of a colour image are grey
    ax.set_xticks([])
    ax.set_yticks([])
