"""Pruned models on disk: weights in safetensors, shapes in JSON, no pickle.

A pruned network is its library's network with other widths. :func:`save_pruned` builds the original once, writes
down in what the pruned one differs (attributes of modules, shapes of parameters), and :func:`load_pruned` builds
the original again and repeats the changes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tree import describe, rebuild

WEIGHTS, SHAPES = "model.safetensors", "shapes.json"
FORMAT, VERSION = "ippro-tp pruned model", 1
LIBRARIES = ("timm", "torchvision")
MODULES = "modules"
"""Library of models whose modules are written down themselves."""
# Flags that make a library download or read weights: a saved model brings its own.
_WEIGHT_FLAGS = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg")
# What nn.Module keeps in its __dict__ for itself.
_INTERNAL = frozenset(vars(nn.Module())) | {"training"}

Builder = Callable[[], nn.Module]
Source = Mapping[str, Any]


def save_pruned(
    model: nn.Module,
    directory: str | os.PathLike[str],
    source: Source | None = None,
    builder: Builder | None = None,
) -> Path:
    """Write a pruned model to ``directory``, from where :func:`load_pruned` brings it back bit for bit.

    The unpruned network is built once, on the CPU, to find out what pruning changed; torch's random stream is
    left as it was. That the model can be loaded again is checked before anything is written, and each of the two
    files appears whole or not at all.

    Args:
        model: the pruned network, of any device and dtype, in train or eval mode.
        directory: folder, created if need be, of ``model.safetensors`` and ``shapes.json``.
        source: how the library builds the unpruned network: ``{"library": "timm" | "torchvision", "name": ...,
            "kwargs": {...}}``; ``kwargs`` (optional) must be plain JSON values and must not ask for weights.
            Without a source and a builder the modules themselves are written down (:mod:`pruning.tree`): what all
            classes can be imported from is enough then.
        builder: instead, for a network of your own, a function without arguments that builds it unpruned; then
            ``source`` may hold any JSON values, as a note, and :func:`load_pruned` needs the same function.

    Returns:
        ``directory``.

    Raises:
        ImportError: safetensors or the library is not installed.
        TypeError: ``source`` is not plain JSON.
        ValueError: a module cannot be written down and needs a ``builder``; ``source`` is no known model, or
            builds a network that ``model`` cannot have been pruned from.

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
    spec: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": note}
    spec |= _differences(model, fresh)
    tensors = _tensors(model, spec)
    _apply(fresh, spec)
    _check_tensors(fresh, {name: tensor.shape for name, tensor in tensors.items()}, spec, SHAPES)
    text = json.dumps(spec, indent=1) + "\n"
    weights = safetensors.save(tensors, metadata={"format": "pt", "shapes_sha256": _digest(text)})
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights)
    _write(folder / SHAPES, text.encode())
    return folder


def load_pruned(
    directory: str | os.PathLike[str], builder: Builder | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the model that :func:`save_pruned` wrote: same outputs to the bit, same train/eval flags.

    Nothing in the files is executed: weights are safetensors, shapes are JSON, of the libraries only registered
    model names are built, never with downloaded weights, and of modules that were written down only classes of
    PyTorch modules are made, without calling their constructors. torch's random stream is left as it was.

    Args:
        directory: folder with ``model.safetensors`` and ``shapes.json``.
        builder: the function given to :func:`save_pruned`, if one was.
        device: where the model shall live.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors or the library is not installed.
        ValueError: the files are not ours, not of one save, or belong to another architecture than the one that
            is built; the message names the first difference.
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
            f"{WEIGHTS} and {SHAPES} in {folder} are not of the same save, or were edited; save the model again"
        )
    model = _build(spec["source"], builder)
    _check_modules(model, spec["modules"])
    _apply(model, spec)
    _check_tensors(model, {name: tensor.shape for name, tensor in tensors.items()}, spec, WEIGHTS)
    _fill(model, tensors, spec)
    return model.to(device)


# -- what the two networks differ in ---------------------------------------------------------------------------


def _differences(model: nn.Module, fresh: nn.Module) -> dict[str, Any]:
    """Everything but values that has to be changed in ``fresh`` to make it ``model``."""
    kinds = {name: type(module).__qualname__ for name, module in model.named_modules()}
    _check_modules(fresh, kinds)
    originals = dict(fresh.named_modules())
    aliases = _aliases(model)
    untied = _aliases(fresh).keys() - aliases.keys()
    attributes, tensors = {}, {}
    for name, module in model.named_modules():
        changed = dict(_changed_attributes(name, module, originals[name]))
        if changed:
            attributes[name] = changed
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{name}.{key}" if name else key
            entry = _tensor_entry(value, getattr(originals[name], key, None), full in untied)
            if entry:
                tensors[full] = entry
    training = [name for name, module in model.named_modules() if module.training]
    return {
        "modules": kinds,
        "attributes": attributes,
        "tensors": tensors,
        "aliases": aliases,
        "training": True if len(training) == len(kinds) else training,
    }


def _changed_attributes(name: str, module: nn.Module, original: nn.Module) -> Iterator[tuple[str, Any]]:
    before = vars(original)
    for key, value in vars(module).items():
        if key in _INTERNAL or not _is_plain(value):
            continue
        if key not in before or not _same(value, before[key]):
            if key in before and not _is_plain(before[key]):
                raise ValueError(
                    f"{name or 'the model'}.{key} is {value!r}, but of type {type(before[key]).__name__} in the "
                    "network that is built; give a builder that makes the same network"
                )
            yield key, list(value) if isinstance(value, (tuple, list)) else value


def _tensor_entry(value: Tensor | None, original: Tensor | None, untied: bool) -> dict[str, Any]:
    """Shape, dtype, ``requires_grad`` and memory format of a tensor, where they differ from the original's."""
    if value is None:
        return {} if original is None else {"shape": None}
    entry: dict[str, Any] = {}
    if original is None or untied or value.shape != original.shape:
        entry["shape"] = list(value.shape)
    if original is None or value.dtype != original.dtype:
        entry["dtype"] = str(value.dtype).removeprefix("torch.")
    if original is None or value.requires_grad != original.requires_grad:
        entry["requires_grad"] = value.requires_grad
    if _channels_last(value) != (original is not None and _channels_last(original)):
        entry["channels_last"] = _channels_last(value)
    return entry


def _channels_last(tensor: Tensor) -> bool:
    last = torch.channels_last
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names under which a parameter or buffer appears again, with the first name of each."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in _named_tensors(model):
        if first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """All parameters and buffers, also those that ``state_dict()`` leaves out, each once."""
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{odd[0]!r} in the model's state_dict is no tensor; only tensors can be saved")
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(model)
        if name not in spec["aliases"]
    }


# -- and how they are made the same ----------------------------------------------------------------------------


def _apply(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Give ``model`` the attributes, shapes, aliases and flags of ``spec``; values are not set."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, changed in spec["attributes"].items():
        for key, value in changed.items():
            if key in _INTERNAL or key.startswith("__") or not (value is None or _is_plain(value)):
                raise ValueError(f"{SHAPES} sets {name}.{key}, which is no attribute that pruning changes")
            kept_as = vars(modules[name]).get(key, ())
            if isinstance(value, list) and not isinstance(kept_as, list):
                value = tuple(value)
            setattr(modules[name], key, value)
    for name, entry in spec["tensors"].items():
        owner, _, key = name.rpartition(".")
        _resize(modules[owner], key, entry, name)
    for name, first in spec["aliases"].items():
        owner, _, key = name.rpartition(".")
        original, _, original_key = first.rpartition(".")
        _store(modules[owner], key)[key] = getattr(modules[original], original_key)
    training = spec["training"]
    for name, module in modules.items():
        module.training = training is True or name in training


def _store(module: nn.Module, key: str) -> dict[str, Any]:
    return module._buffers if key in module._buffers else module._parameters


def _resize(module: nn.Module, key: str, entry: Mapping[str, Any], name: str) -> None:
    store = _store(module, key)
    if key not in store:
        raise ValueError(f"another architecture: the network that is built has no tensor {name!r}")
    old: Tensor | None = store[key]
    if "shape" in entry and entry["shape"] is None:
        store[key] = None
        return
    dtype = getattr(torch, entry["dtype"]) if old is None or "dtype" in entry else old.dtype
    last = entry.get("channels_last", old is not None and _channels_last(old))
    new = torch.empty(
        entry["shape"] if old is None or "shape" in entry else old.shape,
        dtype=dtype,
        device="cpu",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    requires_grad = entry.get("requires_grad", old is not None and old.requires_grad)
    store[key] = nn.Parameter(new, requires_grad) if store is module._parameters else new


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            if name not in spec["aliases"]:
                tensor.copy_(tensors[name])


def _check_modules(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Raise ValueError unless ``model`` has exactly the modules ``kinds``, by name and type."""
    built = {name: type(module).__qualname__ for name, module in model.named_modules()}
    for name in [*kinds, *built]:
        wanted, found = kinds.get(name), built.get(name)
        if wanted != found:
            raise ValueError(
                f"another architecture: {name or 'the model'!r} is {found or 'absent'} in the network that is "
                f"built, but {wanted or 'absent'} in the pruned one; check the source's name and kwargs, or the "
                "builder"
            )


def _check_tensors(
    model: nn.Module, shapes: Mapping[str, torch.Size], spec: Mapping[str, Any], where: str
) -> None:
    """Raise ValueError unless the parameters and buffers of ``model`` have exactly the ``shapes``."""
    own = {name: tensor.shape for name, tensor in _named_tensors(model) if name not in spec["aliases"]}
    for name in sorted({*own, *shapes}):
        if own.get(name) != shapes.get(name):
            have, need = (None if s is None else tuple(s) for s in (shapes.get(name), own.get(name)))
            raise ValueError(
                f"another architecture: {name!r} has the shape {have} in {where}, but the network needs {need}"
            )


# -- sources, files, values ------------------------------------------------------------------------------------


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
            f"the source {source!r} names no library we can build from ({', '.join(LIBRARIES)}); "
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
        raise ValueError(f"{path} is no JSON ({error}); save the model again") from error
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by save_pruned()")
    if spec.get("version") != VERSION:
        raise ValueError(f"{path} is of format version {spec.get('version')}; this package reads {VERSION}")
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


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, (bool, int, float, str)) for v in value)
    return isinstance(value, (bool, int, float, str))


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))
