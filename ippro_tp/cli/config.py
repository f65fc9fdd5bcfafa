"""Flags of ``prune``, what is wrong with them, and which of them decide the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from .errors import UsageError
from .files import as_dict
from .importances import find_importance

if TYPE_CHECKING:
    import torch

    from .recipe import Recipe

try:
    from tyro.conf import Positional
except ModuleNotFoundError:  # flags can be read without the command line
    _T = TypeVar("_T")
    Positional = Annotated[_T, None]  # type: ignore[misc]

NEUTRAL = (
    "out", "dry_run", "workers", "checkpoint_every", "check_images", "export_onnx", "config", "data_dir",
    "checkpoint",
)  # fmt: skip
"""Flags that do not affect the resulting network; weights and images are compared by content."""


@dataclass(frozen=True)
class PruneRunConfig:
    """Prune a network to a target, fine-tune it, save it with a report. Repeat the command to resume."""

    config: Path | None = None
    """Read flags from this YAML file; those on the command line take precedence."""
    model: str = ""
    """Name of the network in its library."""
    library: Literal["timm", "torchvision", "cifar", "python"] = "timm"
    """cifar: networks for 32x32 images (resnet20, resnet56, vgg19, ...); python: --model PACKAGE.MODULE:FUNCTION,
    importable from the current folder, is called with num_classes; a pretrained_cfg attribute on the model, as in
    timm, sets the size and normalisation of images."""
    pretrained: bool = False
    """Start from the library's own weights (downloaded)."""
    checkpoint: Path | None = None
    """Start from these weights: .safetensors, or a PyTorch state dict."""
    train_epochs: int = 0
    """Train the unpruned network for this many epochs first, by the same recipe."""
    data_dir: Path | None = None
    """Folder with train/ and val/ (or test/), each with a folder of images per class; for --task segmentation,
    each with images/ and masks/."""
    task: Literal["classification", "segmentation"] = "classification"
    """segmentation: masks of class numbers, judged by mean intersection over union instead of accuracy."""
    ignore_index: int = 255
    """Number in masks that means no class."""
    macs: float | None = None
    """Target: MACs to keep, as a fraction of the unpruned network's."""
    params: float | None = None
    """Target: parameters to keep, as a fraction."""
    latency: float | None = None
    """Target: time of a forward pass to keep, as a fraction, measured on --device."""
    pruning_ratio: float | None = None
    """Target: the fraction of channels to remove."""
    layer_ratios: tuple[str, ...] = ()
    """With --pruning-ratio: different ratios for some layers, as PATTERN=RATIO; the first regular expression found
    in the name of a layer of a group decides."""
    round_to: int = 0
    """Make widths multiples of this; 0 for any width."""
    max_pruning_ratio: float = 0.9
    """Largest fraction of its channels that a layer may lose, over all steps."""
    importance: str = "pro"
    """pro, l1, l2, bn, lamp, fpgm, taylor, hessian, ispasp, random, ...; or PACKAGE.MODULE:CLASS."""
    cost: Literal["auto", "none", "macs", "params"] = "auto"
    """Divide scores by the cost of a channel, in the global scope; auto: for pro, in the unit of the target."""
    depletion: Literal["auto", "none", "log", "coupled"] = "auto"
    """log: scores rise as their group is emptied, in the global scope; coupled: the covariance of channels counts
    too (pro only); auto: coupled for pro if there is a cost."""
    scope: Literal["global", "local"] = "global"
    """global: one ranking over all layers; local: the same ratio in every layer."""
    steps: int = 1
    """Number of pruning steps, each with its own calibration."""
    compensate: bool = True
    """Refit each layer of the pruned network to its outputs before pruning."""
    recover: bool = False
    """Then distil the unpruned network into it on the calibration images, without labels; takes minutes."""
    bn_reestimate: Literal["auto", "always", "never"] = "auto"
    """Re-estimate BatchNorm statistics after pruning; auto: only without compensation, which sets the means."""
    calibration_images: int = 256
    """Number of training images for scores, compensation and BatchNorm."""
    finetune_epochs: int = 0
    """Epochs of fine-tuning after pruning."""
    lr: float = 0.01
    """Largest learning rate."""
    train_lr: float | None = None
    """Largest learning rate of --train-epochs; by default the same as --lr."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9."""
    weight_decay: float = 1e-4
    """Weight decay."""
    norm_weight_decay: float | None = None
    """Weight decay of normalisation layers, if different."""
    norm_momentum: float | None = None
    """Momentum of normalisation layers, if different (sgd only)."""
    norm_statistics: Literal["batch", "frozen"] = "batch"
    """frozen: in fine-tuning, BatchNorm keeps the running statistics that the compensation relies on."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: falls to zero over the run; step: divided by ten every --lr-step epochs."""
    lr_step: int = 40
    """Number of epochs between steps of --schedule step."""
    amp: bool = False
    """Train in mixed precision (bfloat16 if supported, else float16 with loss scaling)."""
    distill: bool = False
    """Also learn from the unpruned network: half of the loss is the divergence from its softened prediction."""
    augmentation: Literal["auto", "crop", "shift", "flip", "none"] = "auto"
    """crop: random resized crop and mirroring; shift: by up to an eighth, and mirroring (the default of cifar)."""
    seed: int = 0
    """Seed of all random numbers."""
    batch_size: int = 64
    """Images per step."""
    img_size: int | None = None
    """Size of the images; by default that of the network."""
    train_images: int = 0
    """Number of training images to use, a fixed random sample; 0 for all."""
    val_images: int = 0
    """Number of validation images to use, a fixed random sample; 0 for all."""
    workers: int = 2
    """Number of processes that decode images; 0: the main process."""
    check_images: bool = True
    """Decode all images once before anything else, to find damaged ones."""
    checkpoint_every: int = 200
    """Number of training steps between checkpoints; 0: one checkpoint per epoch."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    out: Path = Path("runs/prune")
    """Output folder."""
    export_onnx: bool = False
    """Also write model.onnx and check it with onnxruntime (pip install ippro-tp[onnx])."""
    dry_run: bool = False
    """Print what would be pruned; write nothing."""

    @property
    def target(self) -> tuple[str, float]:
        """``macs``, ``params``, ``latency`` or ``ratio``, and its value."""
        named = {"macs": self.macs, "params": self.params, "latency": self.latency, "ratio": self.pruning_ratio}
        return next((unit, value) for unit, value in named.items() if value is not None)

    @property
    def cost_unit(self) -> str:
        """The unit that scores are divided by: ``none``, ``macs`` or ``params``."""
        if self.scope == "local" or (self.cost == "auto" and not find_importance(self.importance).priced):
            return "none"
        return self.cost if self.cost != "auto" else "params" if self.params is not None else "macs"

    @property
    def depletion_kind(self) -> str:
        """How scores rise as their group is emptied: ``none``, ``log`` or ``coupled``."""
        if self.scope == "local":
            return "none"
        if self.depletion == "auto":
            priced = self.cost_unit != "none" and find_importance(self.importance).priced
            return "coupled" if priced else "none"
        return self.depletion

    def torch_device(self) -> torch.device:
        """The device that ``device`` means."""
        import torch

        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error

    def recipe(self, epochs: int, lr: float, frozen_statistics: bool = False) -> Recipe:
        """How to train for ``epochs``."""
        from .recipe import Recipe

        return Recipe(
            epochs=epochs,
            learning_rate=lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            norm_weight_decay=self.norm_weight_decay,
            norm_momentum=self.norm_momentum,
            frozen_statistics=frozen_statistics,
            schedule=self.schedule,
            step_epochs=self.lr_step,
            amp=self.amp,
            seed=self.seed,
        )


def check(config: PruneRunConfig) -> None:
    """Raise UsageError for flags that cannot mean anything."""
    targets = {
        "--macs": config.macs,
        "--params": config.params,
        "--latency": config.latency,
        "--pruning-ratio": config.pruning_ratio,
    }
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise UsageError(f"give exactly one of {', '.join(targets)}; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value < 1:
        raise UsageError(f"{name} is a fraction between 0 and 1; got {value:g}")
    if not config.model:
        raise UsageError("name the network with --model, for example --library timm --model resnet18")
    if config.data_dir is None:
        raise UsageError("give the folder of the images with --data-dir")
    if config.pretrained and config.checkpoint is not None:
        raise UsageError("--pretrained and --checkpoint both name weights; give one of them")
    if not config.pretrained and config.checkpoint is None and config.train_epochs == 0 and not config.dry_run:
        raise UsageError(
            "an untrained network is not worth pruning; give --pretrained, --checkpoint or --train-epochs"
        )
    if config.layer_ratios and config.pruning_ratio is None:
        raise UsageError("--layer-ratios go with --pruning-ratio; a target in MACs or parameters leaves no choice")
    for flag in ("steps", "batch_size", "calibration_images", "lr_step"):
        if getattr(config, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1; got {getattr(config, flag)}")
    for flag in ("finetune_epochs", "train_epochs", "round_to", "workers", "train_images", "val_images"):
        if getattr(config, flag) < 0:
            raise UsageError(f"--{flag.replace('_', '-')} must not be negative; got {getattr(config, flag)}")
    if not 0 < config.max_pruning_ratio <= 1:
        raise UsageError(f"--max-pruning-ratio must be between 0 and 1; got {config.max_pruning_ratio:g}")
    if config.lr <= 0 or (config.train_lr is not None and config.train_lr <= 0):
        raise UsageError("learning rates must be positive")
    if config.pruning_ratio is not None and config.pruning_ratio > config.max_pruning_ratio:
        raise UsageError(
            f"--pruning-ratio {config.pruning_ratio:g} is above --max-pruning-ratio {config.max_pruning_ratio:g}"
        )
    named = find_importance(config.importance)
    if config.task == "segmentation" and named.labels:
        raise UsageError(f"--importance {config.importance} needs labels of whole images; not for segmentation")
    if config.depletion in ("log", "coupled") and named.signed:
        raise UsageError(
            f"--depletion {config.depletion} is not for --importance {config.importance}, whose scores have a sign"
        )
    if config.depletion == "coupled" and not named.priced:
        raise UsageError(
            f"--depletion coupled is not for --importance {config.importance}, which does not know the covariance "
            "of channels; use log"
        )
    layer_ratios(config)


def layer_ratios(config: PruneRunConfig) -> dict[str, float]:
    """Return ``--layer-ratios`` as a dict from pattern to ratio, in the order given."""
    result = {}
    for entry in config.layer_ratios:
        pattern, _, value = entry.rpartition("=")
        try:
            ratio = float(value)
        except ValueError:
            ratio = -1.0
        if not pattern or not 0 <= ratio < 1:
            raise UsageError(f"--layer-ratios {entry!r}: write PATTERN=RATIO with a ratio from 0 to below 1")
        result[pattern] = ratio
    return result


def identity(config: PruneRunConfig, weights: str, images: dict[str, int]) -> dict[str, Any]:
    """Return everything that decides the result, JSON-ready: two runs with equal identities may share a folder."""
    fields = {key: value for key, value in as_dict(config).items() if key not in NEUTRAL}
    return fields | {"device": config.torch_device().type, "weights": weights, "images": images}


@dataclass(frozen=True)
class ReportConfig:
    """Show the report of one prune, or compare several."""

    directory: Positional[Path]
    """The --out folder of one ``prune``, or a folder that contains several."""


@dataclass(frozen=True)
class InspectConfig:
    """Show what can be pruned of a network, and what would be left whole and why, without pruning it."""

    model: str
    """Name of the network in its library."""
    library: Literal["timm", "torchvision", "cifar", "python"] = "timm"
    """cifar: networks for 32x32 images (resnet20, resnet56, vgg19, ...); python: --model PACKAGE.MODULE:FUNCTION,
    importable from the current folder, is called with num_classes; a pretrained_cfg attribute on the model, as in
    timm, sets the size of images."""
    task: Literal["classification", "segmentation"] = "classification"
    """Kind of torchvision network."""
    num_classes: int = 1000
    """Number of outputs."""
    img_size: int | None = None
    """Size of the images; by default that of the network."""
    pretrained: bool = False
    """Use the library's own weights (downloaded); they do not affect what can be pruned."""
    checkpoint: Path | None = None
    """Use these weights."""
    json: bool = False
    """Print JSON instead of a table."""
