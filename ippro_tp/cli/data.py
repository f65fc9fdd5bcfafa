"""Images of a folder: what there is, how it is read, and batches whose content is a function of seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms, tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2
from tqdm import tqdm

from .config import PruneRunConfig
from .errors import UsageError
from .evaluate import Batch
from .images import output_indices
from .networks import Network
from .seeds import permutation, seeded

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
        raise UsageError(f"--data-dir {root} is no folder")
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
        raise UsageError(f"{folder / strange[0]} is a class that the training images lack")
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
            raise UsageError(f"{folder} holds no {part.name}/; segmentation needs images/ and masks/, named alike")
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
        raise UsageError(f"{path} is no readable image ({error}); delete or replace it") from error


def _check_all(samples: list[Sample], threads: int) -> None:
    def check(sample: Sample) -> None:
        image = open_image(sample[0], "")
        if isinstance(sample[1], Path):
            mask = open_image(sample[1], "")
            if mask.size != image.size or mask.mode not in ("L", "P", "I", "I;16"):
                raise UsageError(f"{sample[1]} is no mask of class numbers of the size of {sample[0].name}")

    with ThreadPoolExecutor(threads) as pool:
        for _ in tqdm(pool.map(check, samples), total=len(samples), desc="checking images", leave=False):
            pass


class FolderImages(Dataset):
    """Images by ``(epoch, index)``: epoch -1 gives the evaluation transform, any other its own augmentation."""

    def __init__(self, samples: list[Sample], evaluate: Callable, augment: Callable, seed: int) -> None:
        self.samples, self._evaluate, self._augment, self._seed = samples, evaluate, augment, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        epoch, index = key
        path, target = self.samples[index]
        image = open_image(path)
        if isinstance(target, Path):
            target = open_image(target, "")
        if epoch < 0:
            return self._evaluate(image, target)
        with seeded(self._seed, "augment", epoch, index):
            return self._augment(image, target)


@dataclass
class Images:
    """The data of a run; every batch is a function of the seed, the epoch and its number."""

    train: FolderImages
    val: FolderImages
    batch_size: int
    workers: int
    seed: int
    classes: list[str]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch; a last part-filled one is left out."""
        return max(len(self.train) // self.batch_size, 1)

    def epoch(self, phase: str, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the augmented, shuffled batches of ``epoch`` from number ``start`` on."""
        order = permutation(len(self.train), self.seed, phase, epoch)
        batches = [order[i * self.batch_size :][: self.batch_size] for i in range(self.steps_per_epoch)]
        number = _epoch_number(phase, epoch)
        yield from self._load(self.train, [[(number, i) for i in batch] for batch in batches[start:]])

    def calibration(self, count: int) -> list[Batch]:
        """Return ``count`` random training images with the evaluation transform."""
        order = permutation(len(self.train), self.seed, "calibration")[:count]
        return list(self._load(self.train, self._plain(order)))

    def validation(self) -> Iterator[Batch]:
        """Yield all validation images."""
        yield from self._load(self.val, self._plain(list(range(len(self.val)))))

    def _plain(self, order: list[int]) -> list[list[tuple[int, int]]]:
        count = math.ceil(len(order) / self.batch_size)
        return [[(-1, i) for i in order[n * self.batch_size :][: self.batch_size]] for n in range(count)]

    def _load(self, images: FolderImages, batches: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=min(self.workers, len(batches)),
            generator=torch.Generator(),  # the loader would draw from the global one
            pin_memory=torch.cuda.is_available(),
        )
        try:
            yield from loader
        except UsageError as error:  # a worker process wraps the message into its traceback
            raise UsageError(str(error).strip().splitlines()[-1].split("UsageError: ")[-1]) from error


def _epoch_number(phase: str, epoch: int) -> int:
    return epoch if phase == "finetuned" else 1_000_000 + epoch


def build_images(config: PruneRunConfig, listing: Listing, network: Network) -> Images:
    """Return the images of ``listing``, transformed as ``network`` wants them."""
    evaluate: Callable
    augment: Callable
    if config.task == "segmentation":
        size = mask_size(config, listing)
        evaluate, augment = (
            SegmentationTransform(network.data, size),
            SegmentationTransform(network.data, size, True),
        )
        train, val = listing.train, listing.val
    else:
        evaluate = Labelled(_evaluation(network.data))
        augment = Labelled(_augmentation(config, network.data))
        outputs = output_indices(listing.classes, network.outputs)
        train, val = ([(p, outputs[t]) for p, t in part] for part in (listing.train, listing.val))
    return Images(
        FolderImages(train, evaluate, augment, config.seed),
        FolderImages(val, evaluate, augment, config.seed),
        config.batch_size,
        config.workers,
        config.seed,
        listing.classes,
    )


@dataclass(frozen=True)
class Labelled:
    """A transform of the image that leaves its class alone."""

    transform: Callable

    def __call__(self, image: Image.Image, target: int) -> tuple[Tensor, int]:
        """Return the tensor and the class."""
        return self.transform(image), target


def _evaluation(data: dict) -> Callable:
    return create_transform(**data, is_training=False)


def _augmentation(config: PruneRunConfig, data: dict) -> Callable:
    kind = config.augmentation
    if kind == "auto":
        kind = "shift" if config.library == "cifar" else "crop"
    size = data["input_size"][-1]
    how = transforms.InterpolationMode(data["interpolation"])
    normal = [transforms.ToTensor(), transforms.Normalize(data["mean"], data["std"])]
    mirror = [transforms.RandomHorizontalFlip()]
    if kind == "crop":
        geometry = [transforms.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=how), *mirror]
    elif kind == "shift":
        whole = [transforms.Resize((size, size), interpolation=how)]
        geometry = [*whole, transforms.RandomCrop(size, padding=size // 8), *mirror]
    elif kind == "flip":
        return transforms.Compose([*mirror, _evaluation(data)])
    else:
        return _evaluation(data)
    return transforms.Compose([*geometry, *normal])


def mask_size(config: PruneRunConfig, listing: Listing) -> tuple[int, int]:
    """Return height (``--img-size``) and width (in the proportions of the first image) for segmentation."""
    width, height = open_image(listing.train[0][0], "").size
    high = config.img_size or height
    return high, max(round(width / height * high / 8), 1) * 8


class SegmentationTransform:
    """An image and its mask, resized (or cropped at random and mirrored) alike."""

    def __init__(self, data: dict, size: tuple[int, int], augment: bool = False) -> None:
        ratio = size[1] / size[0]
        crop = v2.RandomResizedCrop(size, scale=(0.4, 1.0), ratio=(0.9 * ratio, 1.1 * ratio))
        geometry = [crop, v2.RandomHorizontalFlip()] if augment else [v2.Resize(size)]
        to_float = v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)
        self._transform = v2.Compose([*geometry, to_float, v2.Normalize(data["mean"], data["std"])])

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the image ``[3, H, W]`` in float32, and the mask ``[H, W]`` of class numbers in int64."""
        numbers = torch.from_numpy(np.array(mask)).long()[None]
        pair = tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(numbers)
        picture, classes = self._transform(*pair)
        return picture.as_subclass(Tensor), classes.as_subclass(Tensor)[0]
