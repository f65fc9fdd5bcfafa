"""Images of a folder in batches, whose content is a function of seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import PruneRunConfig
from .errors import UsageError
from .evaluate import Batch
from .images import output_indices
from .listing import Listing, Sample, open_image
from .networks import Network
from .seeds import permutation, seeded
from .transforms import Labelled, SegmentationTransform, augmentation, evaluation, mask_size

MODES = {1: "L", 3: "RGB"}
"""How images are decoded for a network of so many input channels."""


class FolderImages(Dataset[Any]):
    """Images by ``(epoch, index)``: epoch -1 gives the evaluation transform, any other its own augmentation."""

    def __init__(
        self,
        samples: list[Sample],
        evaluate: Callable[..., Any],
        augment: Callable[..., Any],
        seed: int,
        mode: str = "RGB",
    ) -> None:
        self.samples, self._evaluate, self._augment, self._seed = samples, evaluate, augment, seed
        self._mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        epoch, index = key
        path, target = self.samples[index]
        image = open_image(path, self._mode)
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
    evaluate: Callable[..., Any]
    augment: Callable[..., Any]
    if config.task == "segmentation":
        size = mask_size(config, listing)
        evaluate, augment = (
            SegmentationTransform(network.data, size),
            SegmentationTransform(network.data, size, True),
        )
        train, val = listing.train, listing.val
    else:
        evaluate = Labelled(evaluation(network.data))
        augment = Labelled(augmentation(config, network.data))
        outputs = output_indices(listing.classes, network.outputs)
        train, val = ([(p, outputs[t]) for p, t in part] for part in (listing.train, listing.val))
    mode = MODES[network.data["input_size"][0]]
    return Images(
        FolderImages(train, evaluate, augment, config.seed, mode),
        FolderImages(val, evaluate, augment, config.seed, mode),
        config.batch_size,
        config.workers,
        config.seed,
        listing.classes,
    )
