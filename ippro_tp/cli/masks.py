"""The figure of a segmentation run: image, truth, unpruned and pruned prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.losses import main_output
from .data import FolderImages
from .objectives import Segmentation, mean_iou

ROWS = 4


def draw_masks(
    path: Path,
    images: FolderImages,
    networks: dict[str, nn.Module],
    device: torch.device,
    objective: Segmentation,
    data: dict[str, Any],
) -> None:
    """Draw evenly spread validation images with what the networks make of them.

    Args:
        path: The PNG file.
        images: Validation images.
        networks: Networks in eval mode, on ``device``, by the title of their column.
        device: Where they are.
        objective: Knows the classes and the number that is ignored.
        data: ``mean`` and ``std`` that images were normalised by.
    """
    chosen = np.linspace(0, len(images) - 1, min(ROWS, len(images))).round().astype(int).tolist()
    first, _ = images[(-1, chosen[0])]
    proportion = first.shape[1] / first.shape[2]
    titles = ("image", "truth", *networks)
    size = (2.6 * len(titles), 2.6 * proportion * len(chosen) + 0.4)
    figure, axes = plt.subplots(len(chosen), len(titles), figsize=size, squeeze=False)
    colours = _palette(objective.classes)
    for row, index in zip(axes, chosen, strict=True):
        image, truth = images[(-1, index)]
        with torch.inference_mode():
            found = [main_output(m(image[None].to(device))).argmax(1)[0].cpu() for m in networks.values()]
        row[0].imshow(_picture(image, data))
        for axis, mask in zip(row[1:], (truth, *found), strict=True):
            axis.imshow(_coloured(mask, colours, objective.ignored))
        for axis, mask in zip(row[2:], found, strict=True):
            text = f"mIoU {100 * mean_iou(objective.confusion(truth, mask)):.0f} %"
            axis.annotate(text, (0.98, 0.03), xycoords="axes fraction", ha="right", fontsize=8, color="white",
                          bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2})  # fmt: skip
    for axis, title in zip(axes[0], titles, strict=True):
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
    colours = plt.get_cmap("tab20")(range(20))[:, :3].tolist()
    colours = [*colours[::2], *colours[1::2]]  # the strong ones first
    return np.array([colours[i % len(colours)] for i in range(classes)])


def _coloured(mask: Tensor, colours: np.ndarray, ignored: int) -> np.ndarray:
    numbers = mask.numpy()
    picture = colours[np.clip(numbers, 0, len(colours) - 1)]
    picture[numbers == ignored] = 0  # black: no class
    return picture


def _picture(image: Tensor, data: dict[str, Any]) -> np.ndarray:
    """Return the image as it was before normalisation, ``[H, W, 3]`` in 0 to 1."""
    mean, std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
