"""``python -m benchmarks export``: a task's network and images as files, for ``ippro-tp prune``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file

from benchmarks.errors import UsageError
from benchmarks.tasks import TaskConfig, build_task
from benchmarks.tasks.base import TensorImages


@dataclass(frozen=True)
class ExportConfig:
    """Write the trained network of a task, and its images, a folder per class."""

    task: TaskConfig = field(default_factory=TaskConfig)
    out: Path = Path("runs/digits-export")
    """Folder of ``network.safetensors``, ``train/CLASS/*.png`` and ``val/CLASS/*.png``; replaced as a whole."""


def run(config: ExportConfig) -> None:
    """Write the files, unless they are there; pixels come back to the bit."""
    if (config.out / "val").is_dir():
        print(f"{config.out} is there already")
        return
    task = build_task(config.task)
    parts = {"train": task.train, "val": task.test}
    if not all(isinstance(images, TensorImages) for images in parts.values()):
        raise UsageError(f"the images of task {task.name} are files already")
    partial = config.out.with_name(f"{config.out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for split, images in parts.items():
        _write(partial / split, images, task.num_classes)
    save_file(task.model.state_dict(), partial / "network.safetensors")
    partial.replace(config.out)
    print(f"wrote {config.out}")


def _write(folder: Path, images: TensorImages, classes: int) -> None:
    names = [f"{number:0{len(str(classes - 1))}d}" for number in range(classes)]
    for name in names:
        (folder / name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        Image.fromarray(array.numpy()).save(folder / names[label] / f"{number:05d}.png")
