"""The recipe: one for all networks, each number a flag."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingConfig:
    """Train one network on CIFAR-10 and write its weights (float16) with a JSON beside them."""

    net: str
    """Name of a network of benchmarks.models.cifar."""
    data_dir: Path
    """Folder with cifar10.npz, torchvision's CIFAR-10 or image folders train/ and test/."""
    out: Path
    """Weights: FILE.safetensors; what was done is told in FILE.json."""
    minutes: float = 0.0
    """End after so many minutes, compilation and test included, on a schedule by the clock. 0: after epochs."""
    epochs: int = 200
    """Epochs, where minutes are not given."""
    device: str = "cuda"
    """Where to train: cuda, cpu."""
    batch_size: int = 512
    """Images of a step; images left over in an epoch are left out of it."""
    learning_rate: float = 2e-3
    """AdamW's at its highest."""
    weight_decay: float = 0.05
    """AdamW's, of matrices and kernels; vectors have none."""
    warmup: float = 0.05
    """Part of the schedule in which the learning rate rises; then it falls along a cosine to zero."""
    label_smoothing: float = 0.1
    """Part of the target that all classes share."""
    clip: float = 1.0
    """Largest norm of a step's gradient; 0 for any."""
    mix: float = 0.8
    """Share of batches that are mixed, by CutMix and mixup in turn."""
    distortion: float = 0.5
    """Strength of rotation, shear, scale, brightness, contrast and saturation, 0 to 1."""
    erasing: float = 0.25
    """Share of images of which a rectangle is erased."""
    calm: float = 0.9
    """Part of the schedule after which images are only shifted and mirrored."""
    ema: float = 0.0
    """Decay a step of a moving average of the weights, which is what is written; 0 for none."""
    compile: bool = False
    """Use torch.compile, where it works."""
    seed: int = 0
    """Of weights, order and augmentation."""
    cache_dir: Path = Path("runs/cache")
    """Where images are kept that were decoded from folders."""
