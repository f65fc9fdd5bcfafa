"""What image classifiers expect: ImageNet's normalisation, and class folders matched to outputs."""

from __future__ import annotations

import re
from typing import Any

from .errors import UsageError

IMAGENET: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
}


def output_indices(classes: list[str], num_outputs: int) -> list[int]:
    """Return the network's output for each class folder.

    Folders map to outputs in sorted order if there are as many; otherwise each name must begin with the
    output's index, as in ``0217_English_springer``.

    Raises:
        UsageError: Folders and outputs cannot be matched.
    """
    if len(classes) == num_outputs:
        return list(range(num_outputs))
    indices = [int(m.group()) if (m := re.match(r"\d+", name)) else -1 for name in classes]
    if len(set(indices)) < len(classes) or min(indices) < 0 or max(indices) >= num_outputs:
        raise UsageError(
            f"{len(classes)} class folders for a network of {num_outputs} outputs: name each folder after its "
            f"output, as in 0217_English_springer (found {classes[0]!r})"
        )
    return indices
