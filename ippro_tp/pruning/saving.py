"""Pruned models on disk: weights in safetensors, shapes in JSON, no pickle.

A pruned network is its library's network with other widths. :func:`save_pruned` builds the original and records
how the pruned one differs from it (attributes of modules, shapes of parameters); :func:`load_pruned` builds the
original again and applies the differences.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.batches import as_call
from ..calibration.guard import evaluating
from .differences import apply, differences, first_difference
from .tree import describe, rebuild
from .values import Comparison

WEIGHTS, SHAPES = "model.safetensors", "shapes.json"
FORMAT, VERSION, READ = "ippro-tp pruned model", 2, (1, 2)
LIBRARIES = ("timm", "torchvision")
MODULES = "modules"
"""Library of models whose modules are written down themselves."""
# Flags that make a library download or read weights: a saved model brings its own.
_WEIGHT_FLAGS = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg")

Builder = Callable[[], nn.Module]
Source = Mapping[str, Any]


def save_pruned(
    model: nn.Module,
    directory: str | os.PathLike[str],
    source: Source | None = None,
    builder: Builder | None = None,
    *,
    example_inputs: Any = None,
) -> Path:
    """Write a pruned model to ``directory``; :func:`load_pruned` restores it bit for bit.

    The unpruned network is built on the CPU to find out what pruning changed: parameters, buffers, and attributes
    of modules (numbers, strings, None, tensors, and tuples, lists and dicts of them). torch's random state is not
    changed. Before anything is written, the model is restored from the contents of the files, compared with the
    original and, given ``example_inputs``, run next to it. Each of the two files is written completely or not at
    all.

    Args:
        model: the pruned network, on any device, of any dtype, in train or eval mode.
        directory: folder of ``model.safetensors`` and ``shapes.json``, created if it does not exist.
        source: how the library builds the unpruned network: ``{"library": "timm" | "torchvision", "name": ...,
            "kwargs": {...}}``; ``kwargs`` (optional) must be plain JSON values and must not ask for weights.
            Without ``source`` and ``builder`` the modules themselves are recorded (:mod:`pruning.tree`); all their
            classes must then be importable.
        builder: for a network of your own, a function without arguments that builds it unpruned;
            :func:`load_pruned` needs the same function, and ``source`` may hold any JSON values as a note.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Both networks
            are run on them and must give identical outputs.

    Returns:
        ``directory``.

    Raises:
        ImportError: safetensors or the library is not installed.
        TypeError: ``source`` is not plain JSON.
        ValueError: a module cannot be recorded and needs a ``builder``; ``source`` is not a known model, or builds
            a network that ``model`` cannot have been pruned from; or something cannot be saved or restored. The
            message names it.

    Example:
        >>> import tempfile, torch, torch_pruning as tp
        >>> from ippro_tp import load_pruned, save_pruned
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = build()
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 4), tp.importance.RandomImportance(),
        ...     pruning_ratio=0.5, ignored_layers=[model[2]])
        >>> pruner.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_pruned(save_pruned(model, folder, builder=build), builder=build)
        >>> x = torch.randn(3, 4)
        >>> again[0].out_features, torch.equal(again(x), model(x))
        (4, True)
    """
    safetensors = _library("safetensors.torch", "safetensors")
    folder = Path(directory)
    if source is None and builder is None:
        source = {"library": MODULES, "tree": describe(model)}
    note = _as_json(dict(source or {}))
    fresh = _build(note, builder)
    changes, tensors = differences(model, fresh)
    spec: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": note, **changes}
    text = json.dumps(spec, indent=1) + "\n"
    weights = safetensors.save(tensors, metadata={"format": "pt", "shapes_sha256": _digest(text)})
    again = _build(note, builder)
    apply(again, json.loads(text), safetensors.load(weights), SHAPES)
    _prove(model, again, example_inputs)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights)
    _write(folder / SHAPES, text.encode())
    return folder


def load_pruned(
    directory: str | os.PathLike[str], builder: Builder | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the model that :func:`save_pruned` wrote, with identical outputs and train/eval flags.

    Nothing in the files is executed: weights are safetensors, shapes are JSON. Of the libraries, only registered
    models are built, and never with downloaded weights; recorded modules may only be subclasses of
    ``nn.Module``, and their constructors are not called. torch's random state is not changed.

    Args:
        directory: folder with ``model.safetensors`` and ``shapes.json``.
        builder: the function given to :func:`save_pruned`, if there was one.
        device: the device of the model.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors or the library is not installed.
        ValueError: the files were not written by :func:`save_pruned`, do not belong together, or do not fit the
            architecture that is built; the message names the first difference.
    """
    safetensors = _library("safetensors", "safetensors")
    folder = Path(directory)
    for name in (SHAPES, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; give the folder that save_pruned() wrote")
    text = (folder / SHAPES).read_text()
    spec = _read_spec(text, folder / SHAPES)
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); save the model again") from error
    if metadata.get("shapes_sha256") != _digest(text):
        raise ValueError(
            f"{WEIGHTS} and {SHAPES} in {folder} were not saved together, or were edited; save the model again"
        )
    model = _build(spec["source"], builder)
    apply(model, spec, tensors, WEIGHTS)
    return model.to(device)


def _prove(model: nn.Module, again: nn.Module, example_inputs: Any) -> None:
    """Raise ValueError unless ``again``, loaded, is ``model``: in all that it holds, and in what it gives."""
    found = first_difference(model, again)
    if found:
        raise ValueError(f"{found} cannot be restored exactly, so nothing was saved. Please report the model.")
    if example_inputs is None:
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = as_call(example_inputs)

    def run(network: nn.Module) -> Any:
        devices = [device] if device.type == "cuda" else []
        with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return network(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    wanted = run(model)
    at = Comparison(model, again).difference(wanted, run(again.to(device)))
    if at and not Comparison(model, model).difference(wanted, run(model)):
        raise ValueError(
            f"the model that was loaded again gives other outputs (output{at.removesuffix('.')}): "
            f"its forward depends "
            "on something that is neither a parameter, a buffer nor an attribute of a module. Nothing was saved."
        )


# -- sources and files -----------------------------------------------------------------------------------------


def _build(source: Mapping[str, Any], builder: Builder | None) -> nn.Module:
    """Build the unpruned network on the CPU without touching torch's random stream."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return builder() if builder is not None else _from_library(source)
    finally:
        torch.set_default_dtype(dtype)


def _from_library(source: Mapping[str, Any]) -> nn.Module:
    if source.get("library") == MODULES:
        return rebuild(source["tree"])
    library, name, kwargs = source.get("library"), source.get("name"), dict(source.get("kwargs") or {})
    if library not in LIBRARIES:
        raise ValueError(
            f"the source {source!r} names no library that is supported ({', '.join(LIBRARIES)}); "
            "for a network of your own give builder="
        )
    flags = [key for key in kwargs if key in _WEIGHT_FLAGS and kwargs[key]]
    if flags:
        raise ValueError(f"kwargs of the source must not ask for weights: leave out {flags[0]!r}")
    kwargs = {key: value for key, value in kwargs.items() if key not in _WEIGHT_FLAGS}
    if library == "timm":
        timm = _library("timm", "timm")
        if not timm.is_model(name):
            raise ValueError(f"timm {timm.__version__} has no model {name!r}")
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
        return model
    models = _library("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}")
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        kwargs["weights_backbone"] = None  # detection and segmentation models would download theirs
    built: nn.Module = models.get_model(name, weights=None, **kwargs)
    return built


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"saving and loading this model needs the package {package!r}: pip install "
            f"{'ippro-tp[safetensors]' if package == 'safetensors' else package}"
        ) from error


def _read_spec(text: str, path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the model again") from error
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by save_pruned()")
    if spec.get("version") not in READ:
        raise ValueError(f"{path} has format version {spec.get('version')}; this package reads 1 to {VERSION}")
    return spec


def _as_json(source: dict[str, Any]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(json.dumps(source))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the source must hold plain JSON values only: {error}") from error
    return result


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
