"""Task ``imagefolder``: any timm or torchvision classifier on any tree of image folders."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torchvision
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from benchmarks.errors import UsageError
from benchmarks.models.checkpoints import load_checkpoint
from benchmarks.tasks.base import Batch, Task, TaskConfig, TaskDefaults
from ippro_tp.cli.images import IMAGENET, output_indices

CACHE_BYTES = 1 << 30
DEFAULTS = TaskDefaults(
    criteria=("random", "l1", "l2", "taylor", "taylor-gate", "pro"),
    targets=(0.9, 0.75),
    calibration_images=256,
)


class FolderImages:
    """An image folder with a transform, whose decoded images stay in memory up to a budget.

    Args:
        root: Folder with one subfolder per class.
        transform: From a PIL image to a tensor.
        num_outputs: Outputs of the network; with fewer folders than outputs, folder names tell the output.
    """

    def __init__(self, root: Path, transform, num_outputs: int) -> None:
        self._folder = ImageFolder(root, transform)
        self._outputs = output_indices(self._folder.classes, num_outputs)
        self._decoded: dict[int, Tensor] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._folder)

    def batch(self, indices: Tensor) -> Batch:
        """Return the transformed images and the network's output index of each."""
        labels = [self._outputs[self._folder.targets[i]] for i in indices.tolist()]
        return torch.stack([self._image(i) for i in indices.tolist()]), torch.tensor(labels)

    def _image(self, index: int) -> Tensor:
        if index in self._decoded:
            return self._decoded[index]
        image = self._folder[index][0]
        if self._bytes + image.nbytes <= CACHE_BYTES:
            self._decoded[index] = image
            self._bytes += image.nbytes
        return image


def build(config: TaskConfig) -> Task:
    """Return the task for ``--model NAME`` (timm first, then torchvision) and the images under ``--data-dir``."""
    if not config.model or config.data_dir is None:
        raise UsageError("task imagefolder needs --model NAME and --data-dir DIR with train/ and val/ (or test/)")
    if not config.pretrained and config.checkpoint is None:
        raise UsageError("task imagefolder needs trained weights; give --checkpoint FILE or --pretrained")
    folders = [next((p for n in names if (p := config.data_dir / n).is_dir()), None) for names in _SPLITS]
    if None in folders:
        raise UsageError(f"{config.data_dir} must hold train/ and val/ (or test/)")
    model, data_config = _create(config.model, config.pretrained)
    if config.checkpoint is not None:
        load_checkpoint(model, config.checkpoint)
    if config.crop_pct is not None:
        data_config["crop_pct"] = config.crop_pct
    transform = create_transform(**data_config, is_training=False)
    num_classes, ignored = _classifier(model, data_config["input_size"])
    train, test = (FolderImages(folder, transform, num_classes) for folder in folders)
    example = torch.zeros(1, *data_config["input_size"])
    return Task("imagefolder", config.model, model, example, train, test, num_classes, ignored, augment=_flip)


def unlabelled(config: TaskConfig, folder: Path, count: int) -> list[Tensor]:
    """Return an even choice of the images anywhere under ``folder``, as the network takes them, in batches.

    Args:
        config: of the task; its network decides how images are prepared.
        folder: image files in any layout.
        count: how many; all if there are fewer.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {*IMG_EXTENSIONS, ".webp"})
    if not paths:
        raise UsageError(f"{folder} holds no images")
    paths = [paths[i * len(paths) // min(count, len(paths))] for i in range(min(count, len(paths)))]
    _, data_config = _create(config.model, pretrained=False)
    if config.crop_pct is not None:
        data_config["crop_pct"] = config.crop_pct
    transform = create_transform(**data_config, is_training=False)
    return list(torch.stack([transform(default_loader(str(p))) for p in paths]).split(config.batch_size))


_SPLITS = (("train",), ("val", "test"))


def _create(name: str, pretrained: bool) -> tuple[nn.Module, dict]:
    if timm.is_model(name):
        model = timm.create_model(name, pretrained=pretrained)
        return model, resolve_data_config({}, model=model)
    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None), dict(IMAGENET)
    raise UsageError(f"--model {name!r} is known neither to timm nor to torchvision.models")


def _classifier(model: nn.Module, input_size: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
    """Return the number of outputs, and the name of the last convolution or Linear with that many outputs."""
    model.eval()
    with torch.no_grad():
        outputs = model(torch.zeros(2, *input_size)).shape[-1]
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    names = [n for n, m in layers if (m.out_features if isinstance(m, nn.Linear) else m.out_channels) == outputs]
    if not names:
        raise UsageError(
            f"{type(model).__name__} has no layer with its {outputs} outputs; no classifier to protect"
        )
    return outputs, (names[-1],)


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
