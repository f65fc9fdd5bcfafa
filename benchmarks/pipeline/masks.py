"""The figure of a segmentation run: image, truth, unpruned and pruned prediction."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pipeline.data import FolderImages
from benchmarks.pipeline.objectives import Segmentation, mean_iou
from ippro_tp.losses import main_output

ROWS = 4
COLUMNS = ("image", "truth", "unpruned", "pruned")


def draw_masks(
    path: Path,
    images: FolderImages,
    unpruned: nn.Module,
    pruned: nn.Module,
    device: torch.device,
    objective: Segmentation,
) -> None:
    """Draw evenly spread validation images with what both networks make of them.

    Args:
        path: The PNG file.
        images: Validation images.
        unpruned: A network in eval mode, on ``device``.
        pruned: Another.
        device: Where both are.
        objective: Knows the classes and the number that is ignored.
    """
    chosen = np.linspace(0, len(images) - 1, min(ROWS, len(images))).round().astype(int).tolist()
    first, _ = images[(-1, chosen[0])]
    proportion = first.shape[1] / first.shape[2]
    size = (2.6 * len(COLUMNS), 2.6 * proportion * len(chosen) + 0.4)
    figure, axes = plt.subplots(len(chosen), len(COLUMNS), figsize=size, squeeze=False)
    colours = _palette(objective.classes)
    for row, index in zip(axes, chosen, strict=True):
        image, truth = images[(-1, index)]
        with torch.inference_mode():
            found = [main_output(m(image[None].to(device))).argmax(1)[0].cpu() for m in (unpruned, pruned)]
        row[0].imshow(_picture(image))
        for axis, mask in zip(row[1:], (truth, *found), strict=True):
            axis.imshow(_coloured(mask, colours, objective.ignored))
        for axis, mask in zip(row[2:], found, strict=True):
            axis.set_xlabel(f"mIoU {100 * mean_iou(objective.confusion(truth, mask)):.0f} %", fontsize=8)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    figure.savefig(partial, dpi=140, bbox_inches="tight", format="png")
    plt.close(figure)
    partial.replace(path)


def _palette(classes: int) -> np.ndarray:
    colours = plt.get_cmap("tab20" if classes > 10 else "tab10").colors
    return np.array([colours[i % len(colours)] for i in range(classes)])


def _coloured(mask: Tensor, colours: np.ndarray, ignored: int) -> np.ndarray:
    numbers = mask.numpy()
    picture = colours[np.clip(numbers, 0, len(colours) - 1)]
    picture[numbers == ignored] = 0  # black: no class
    return picture


def _picture(image: Tensor) -> np.ndarray:
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy()
