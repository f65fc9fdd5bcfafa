"""Images without labels, in any layout."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.errors import UsageError
from benchmarks.tasks import TaskConfig
from benchmarks.tasks.imagefolder import unlabelled


def test_images_are_found_in_any_layout(tmp_path):
    for number in range(7):
        folder = tmp_path / "deep" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (30 * number, 0, 0)).save(folder / f"{number}.png")
    config = TaskConfig(task="imagefolder", model="test_resnet", batch_size=2)
    batches = unlabelled(config, tmp_path, 5)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    images = torch.cat(batches)
    assert images.shape[1] == 3
    assert len(images.mean((1, 2, 3)).unique()) == 5
    assert len(torch.cat(unlabelled(config, tmp_path, 100))) == 7


def test_no_images_are_named(tmp_path):
    with pytest.raises(UsageError, match="holds no images"):
        unlabelled(TaskConfig(task="imagefolder", model="test_resnet"), tmp_path, 5)
