"""Networks by library and name, with what the rest has to know of them: classifier, input size, how to rebuild."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_data_config  # type: ignore[attr-defined]
from torch import Tensor, nn

from ..calibration.losses import main_output
from .cifar import NETWORKS, frozen_parameters
from .config import PruneRunConfig
from .errors import UsageError
from .images import IMAGENET, output_indices
from .seeds import seeded
from .weights import load_checkpoint, read_state_dict


@dataclass
class Network:
    """A network before pruning.

    Attributes:
        model: In eval mode, on the CPU.
        source: Library, name and kwargs.
        example: One input of zeros, ``[1, C, H, W]``.
        ignored: Names of the layers that keep their outputs.
        frozen: Names of parameters that training leaves alone.
        outputs: Number of classes.
        data: ``input_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation``.
    """

    model: nn.Module
    source: dict[str, Any]
    example: Tensor
    ignored: tuple[str, ...]
    frozen: tuple[str, ...]
    outputs: int
    data: dict[str, Any]

    @property
    def saved_as(self) -> dict[str, Any] | None:
        """The source that ``save_pruned`` takes; ``None`` where the modules themselves are to be written down."""
        return self.source if self.source["library"] in ("timm", "torchvision") else None

    def rebuild(self) -> nn.Module:
        """Return the untrained network again."""
        with seeded("rebuild"):
            return _build(self.source)


def build_network(config: PruneRunConfig, classes: list[str], any_classes: bool = False) -> Network:
    """Return the network that ``config`` names, with its weights.

    Args:
        config: The flags.
        classes: Names of the class folders, or one name per class of the masks.
        any_classes: They need not be the network's.

    Raises:
        UsageError: The name is unknown, or weights, classes and network do not fit together.
    """
    kwargs = _kwargs(config, None if config.pretrained else len(classes))
    source = {"library": config.library, "name": config.model, "kwargs": kwargs}
    with seeded(config.seed, "network"):
        model = _weighted(config, source, classes)
    model.eval()
    data = _data_config(config, model)
    if data["input_size"][0] not in (1, 3):
        raise UsageError(f"{config.model} takes images of {data['input_size'][0]} channels; files have 1 or 3")
    example = torch.zeros(1, *data["input_size"])
    outputs, ignored = _classifiers(model, example)
    if not any_classes:
        check_classes(config, classes, outputs)
    return Network(model, source, example, ignored, frozen_parameters(model), outputs, data)


def check_classes(config: PruneRunConfig, classes: list[str], outputs: int) -> None:
    """Raise UsageError unless each class is an output of the network."""
    if config.task == "classification":
        output_indices(classes, outputs)
    elif len(classes) > outputs:
        raise UsageError(
            f"the masks hold numbers up to {len(classes) - 1}, the network has {outputs} outputs: give masks and "
            "weights of the same classes (--ignore-index: the number that means no class)"
        )


def _kwargs(config: PruneRunConfig, num_classes: int | None) -> dict[str, Any]:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    _check_name(config)
    if config.library == "timm" and config.img_size:
        known = timm.get_pretrained_cfg(config.model)
        if known is not None and known.fixed_input_size:
            kwargs["img_size"] = config.img_size
    if config.library == "torchvision" and config.img_size and config.model.startswith("vit_"):
        kwargs["image_size"] = config.img_size
    if config.task == "segmentation":
        kwargs["aux_loss"] = True
    return kwargs


def _check_name(config: PruneRunConfig) -> None:
    name, library = config.model, config.library
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    if config.task == "segmentation":
        known = library == "torchvision" and name in segmentation
        choice = f"--library torchvision with one of {', '.join(segmentation)}"
    elif library == "timm":
        known, choice = timm.is_model(name), "see timm.list_models()"
    elif library == "torchvision":
        known = name in torchvision.models.list_models(module=torchvision.models)
        choice = "see torchvision.models.list_models()"
    elif library == "cifar":
        known, choice = name in NETWORKS, f"known: {', '.join(NETWORKS)}"
    else:
        known, choice = _imported(name) is not None, "write PACKAGE.MODULE:FUNCTION, of what can be imported"
    if not known:
        raise UsageError(f"--library {library} has no model {name!r} for {config.task}; {choice}")


def _build(source: dict[str, Any]) -> nn.Module:
    library, name, kwargs = source["library"], source["name"], source["kwargs"]
    if library == "timm":
        return timm.create_model(name, pretrained=False, **kwargs)
    if library == "torchvision":
        extra = {"weights_backbone": None} if "aux_loss" in kwargs else {}
        return torchvision.models.get_model(name, weights=None, **extra, **kwargs)
    if library == "cifar":
        return NETWORKS[name](**kwargs)
    builder = _imported(name)
    if builder is None:
        raise UsageError(f"--model {name} can no longer be imported")
    return builder(**kwargs)


def _imported(name: str) -> Callable[..., nn.Module] | None:
    """Return what ``PACKAGE.MODULE:NAME`` stands for, if it can be called."""
    module, found, attribute = name.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute) if found else None
    except (ImportError, AttributeError):
        return None
    return value if callable(value) else None


def _weighted(config: PruneRunConfig, source: dict[str, Any], classes: list[str]) -> nn.Module:
    """Build the network and load its weights; ``source`` is completed by the number of outputs."""
    if config.pretrained:
        return _pretrained(config, source, classes)
    model = _build(source)
    if config.checkpoint is None:
        return model
    state = read_state_dict(config.checkpoint)
    data = _data_config(config, model)
    _, (name, *_) = _classifiers(model.eval(), torch.zeros(1, *data["input_size"]))
    head = state.get(f"{name}.weight")
    if head is not None and len(head) != len(classes):  # the checkpoint knows how many outputs it has
        source["kwargs"]["num_classes"] = len(head)
        model = _build(source)
    load_checkpoint(model, config.checkpoint, frozen_parameters(model))
    return model


def _pretrained(config: PruneRunConfig, source: dict[str, Any], classes: list[str]) -> nn.Module:
    if config.library in ("cifar", "python"):
        raise UsageError(
            f"--library {config.library} has no weights to download; give --checkpoint or --train-epochs"
        )
    try:
        if config.library == "timm":
            model = timm.create_model(config.model, pretrained=True, **source["kwargs"])
        else:
            model = torchvision.models.get_model(config.model, weights="DEFAULT", **source["kwargs"])
    except Exception as error:  # whatever the two libraries raise without a network or for nets without weights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"cannot get pretrained weights of {config.model} ({reason}); give --checkpoint FILE"
        ) from error
    data = _data_config(config, model)
    outputs, ignored = _classifiers(model.eval(), torch.zeros(1, *data["input_size"]))
    if config.train_epochs == 0:
        try:
            check_classes(config, classes, outputs)
        except UsageError as error:
            raise UsageError(f"{error}; or train a new classifier with --train-epochs") from error
        return model
    if outputs == len(classes) or (config.task == "classification" and _named_after(classes, outputs)):
        return model
    source["kwargs"]["num_classes"] = len(classes)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(f"{n}." for n in ignored))}
    model = _build(source)
    model.load_state_dict(state, strict=False)
    return model


def _named_after(classes: list[str], outputs: int) -> bool:
    """Whether the class folders are named after outputs of the network."""
    try:
        output_indices(classes, outputs)
    except UsageError:
        return False
    return True


def _data_config(config: PruneRunConfig, model: nn.Module) -> dict[str, Any]:
    if config.library == "timm" or hasattr(model, "pretrained_cfg"):
        data = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    elif config.library == "torchvision":
        data = dict(IMAGENET)
    else:
        data = dict(IMAGENET) | {"input_size": (3, 32, 32), "crop_pct": 1.0}
    if config.img_size:
        data["input_size"] = (data["input_size"][0], config.img_size, config.img_size)
    return {k: data[k] for k in ("input_size", "mean", "std", "crop_pct")} | {
        "interpolation": data.get("interpolation", "bilinear")
    }


def _classifiers(model: nn.Module, example: Tensor) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes, and the names of the layers that give them (an auxiliary head's too)."""
    try:
        with torch.no_grad():
            outputs = main_output(model(example)).shape[1]
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} does not run on images of {tuple(example.shape[1:])} "
            f"({str(error).splitlines()[0]}); change --img-size"
        ) from error
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    names = [n for n, m in layers if getattr(m, "out_features", getattr(m, "out_channels", 0)) == outputs]
    heads = [n for n in names if n.startswith("aux_classifier.")][-1:]
    heads = [n for n in names if n not in heads][-1:] + heads
    if not heads:
        raise UsageError(
            f"{type(model).__name__} has no layer with its {outputs} outputs; no classifier to protect"
        )
    return outputs, tuple(heads)
