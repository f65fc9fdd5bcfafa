"""Files of a folder of images: what there is, what is wrong with it, and how one is decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

from .config import PruneRunConfig
from .errors import UsageError
from .seeds import permutation

Sample = tuple[Path, Any]
"""An image, and the number of its class or its mask."""

SPLITS = {"train": ("train",), "val": ("val", "test")}


@dataclass(frozen=True)
class Listing:
    """The files of both splits, and the classes."""

    train: list[Sample]
    val: list[Sample]
    classes: list[str]

    def counts(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return {"train": len(self.train), "val": len(self.val), "classes": len(self.classes)}


def read_listing(config: PruneRunConfig) -> Listing:
    """Return the images under ``config.data_dir``, cut to the numbers asked for.

    Raises:
        UsageError: A folder is missing, a class has no images, an image or mask cannot be read.
    """
    assert config.data_dir is not None
    folders = {split: _split_folder(config.data_dir, split) for split in SPLITS}
    if config.task == "segmentation":
        found = {split: _masked(folder) for split, folder in folders.items()}
        classes = None
    else:
        classes = sorted(p.name for p in folders["train"].iterdir() if p.is_dir())
        found = {split: _classified(folder, classes) for split, folder in folders.items()}
    limits = {"train": config.train_images, "val": config.val_images}
    for split, limit in limits.items():
        if 0 < limit < len(found[split]):
            chosen = sorted(permutation(len(found[split]), "subset", split)[:limit])
            found[split] = [found[split][i] for i in chosen]
    if config.check_images:
        _check_all([*found["train"], *found["val"]], max(config.workers, 1))
    if classes is None:
        count = _mask_classes([*found["train"], *found["val"]], config.ignore_index)
        classes = [f"class {i}" for i in range(count)]
    return Listing(found["train"], found["val"], classes)


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise UsageError(f"--data-dir {root} is not a folder")
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"{root} holds no {'/ or '.join(SPLITS[split])}/; put the images there, a folder per class")


def _classified(folder: Path, classes: list[str]) -> list[Sample]:
    own = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not own:
        raise UsageError(f"{folder} holds no class folders; put the images into {folder}/CLASS/")
    strange = sorted(set(own) - set(classes))
    if strange:
        raise UsageError(f"{folder / strange[0]} is a class without training images")
    numbers = {name: i for i, name in enumerate(classes) if name in own}
    samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(numbers.values()) - {number for _, number in samples})
    if empty:
        raise UsageError(f"class folder {folder / classes[empty[0]]} holds no images; fill or delete it")
    return [(Path(path), number) for path, number in samples]


def _masked(folder: Path) -> list[Sample]:
    images, masks = folder / "images", folder / "masks"
    for part in (images, masks):
        if not part.is_dir():
            raise UsageError(
                f"{folder} holds no {part.name}/; segmentation needs images/ and masks/ with the same file names"
            )
    by_stem = {p.stem: p for p in masks.iterdir() if p.suffix.lower() in IMG_EXTENSIONS}
    samples: list[Sample] = []
    for path in sorted(p for p in images.iterdir() if p.suffix.lower() in IMG_EXTENSIONS):
        if path.stem not in by_stem:
            raise UsageError(f"{path} has no mask of the same name in {masks}")
        samples.append((path, by_stem[path.stem]))
    if not samples:
        raise UsageError(f"{images} holds no images")
    return samples


def _mask_classes(samples: list[Sample], ignored: int) -> int:
    largest = 0
    for _, path in samples:
        numbers = np.unique(np.asarray(Image.open(path)))
        largest = max(largest, int(max((n for n in numbers if n != ignored), default=0)))
    return largest + 1


def open_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Return the decoded image.

    Raises:
        UsageError: The file is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode) if mode else image.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a readable image ({error}); delete or replace it") from error


def _check_all(samples: list[Sample], threads: int) -> None:
    def check(sample: Sample) -> None:
        image = open_image(sample[0], "")
        if isinstance(sample[1], Path):
            mask = open_image(sample[1], "")
            if mask.size != image.size or mask.mode not in ("L", "P", "I", "I;16"):
                raise UsageError(f"{sample[1]} is not a mask of class numbers with the size of {sample[0].name}")

    with ThreadPoolExecutor(threads) as pool:
        for _ in tqdm(pool.map(check, samples), total=len(samples), desc="checking images", leave=False):
            pass
