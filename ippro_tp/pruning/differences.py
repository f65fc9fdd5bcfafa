"""In what a pruned network differs from the network that its library builds, and making the one into the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .values import Comparison, NotPlain, decode, encode, same_tensor

# What nn.Module keeps in its __dict__ for itself.
_INTERNAL = frozenset(vars(nn.Module())) | {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
KEPT = "attribute:"
"""Names of tensors that are neither parameters nor buffers begin so."""

Spec = dict[str, Any]


def differences(model: nn.Module, fresh: nn.Module) -> tuple[Spec, dict[str, Tensor]]:
    """Everything that has to be changed in ``fresh`` to make it ``model``, and the tensors of ``model``.

    Raises:
        ValueError: ``fresh`` is another network, or something differs that cannot be written; it is named.
    """
    kinds = {name: type(module).__qualname__ for name, module in model.named_modules()}
    check_modules(fresh, kinds)
    originals = dict(fresh.named_modules())
    aliases = _aliases(model)
    untied = _aliases(fresh).keys() - aliases.keys()
    tensors = _tensors(model, aliases)
    compared = Comparison(model, fresh)
    attributes, entries = {}, {}
    for name, module in model.named_modules():
        _check_hooks(name, module, originals[name])
        changed = _changed_attributes(name, module, originals[name], compared, tensors)
        if changed:
            attributes[name] = changed
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{name}.{key}" if name else key
            entry = _tensor_entry(value, getattr(originals[name], key, None), full in untied)
            if entry:
                entries[full] = entry
    training = [name for name, module in model.named_modules() if module.training]
    spec: Spec = {
        "modules": kinds,
        "attributes": attributes,
        "tensors": entries,
        "aliases": aliases,
        "training": True if len(training) == len(kinds) else training,
    }
    return spec, tensors


def apply(model: nn.Module, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Make ``model``, as it was built, the network that :func:`differences` described.

    Raises:
        ValueError: it is another network; ``where`` names the file in the message.
    """
    check_modules(model, spec["modules"])
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, changed in spec["attributes"].items():
        for key, code in changed.items():
            _set(modules[name], name, key, code, tensors, where)
    for name, entry in spec["tensors"].items():
        owner, _, key = name.rpartition(".")
        _resize(modules[owner], key, entry, name)
    for name, first in spec["aliases"].items():
        owner, _, key = name.rpartition(".")
        original, _, original_key = first.rpartition(".")
        _store(modules[owner], key)[key] = getattr(modules[original], original_key)
    training = spec["training"]
    for name, module in model.named_modules():
        module.training = training is True or name in training
    _check_tensors(model, tensors, spec, where)
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            if name not in spec["aliases"]:
                tensor.copy_(tensors[name])


def first_difference(model: nn.Module, again: nn.Module) -> str:
    """What differs between two networks that should be the same; empty if nothing does."""
    originals = dict(again.named_modules())
    compared = Comparison(model, again)
    for name, module in model.named_modules():
        other = originals.get(name)
        if other is None or type(other).__qualname__ != type(module).__qualname__:
            return f"module {name!r}"
        if other.training != module.training:
            return f"the mode (train or eval) of {name or 'the model'!r}"
        for key in sorted(vars(module).keys() | vars(other).keys()):
            if key in _INTERNAL:
                continue
            if key not in vars(module) or key not in vars(other):
                return f"the attribute {_full(name, key)}"
            at = compared.difference(vars(module)[key], vars(other)[key])
            if at:
                return f"the attribute {_full(name, key)}{at.removesuffix('.')}"
    mine, theirs = dict(_named_tensors(model)), dict(_named_tensors(again))
    for name in [*mine, *theirs]:
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or not same_tensor(a, b) or a.requires_grad != b.requires_grad:
            return f"the tensor {name!r}"
    return "" if _aliases(model) == _aliases(again) else "which tensors are shared"


def check_modules(model: nn.Module, kinds: Mapping[str, str]) -> None:
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


# -- attributes ------------------------------------------------------------------------------------------------


def _full(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check_hooks(name: str, module: nn.Module, original: nn.Module) -> None:
    for kind in _HOOKS:
        if len(getattr(module, kind)) > len(getattr(original, kind)):
            raise ValueError(
                f"{name or 'the model'!r} has a hook on its forward pass that the network that is "
                f"built has not; hooks "
                "are not saved. Remove it, or let the builder register it."
            )


def _changed_attributes(
    name: str, module: nn.Module, original: nn.Module, compared: Comparison, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    before, now, changed = vars(original), vars(module), {}

    def put(tensor: Tensor) -> str:
        kept = f"{KEPT}{_full(name, key)}:{len(tensors)}"
        tensors[kept] = tensor.detach().cpu().contiguous().clone()
        return kept

    for key in [*now, *(k for k in before if k not in now)]:
        if key in _INTERNAL:
            continue
        if key not in now:
            changed[key] = {"deleted": True}
            continue
        at = compared.difference(now[key], before[key]) if key in before else "."
        if not at:
            continue
        try:
            if key in before and not _is_plain(before[key]):
                raise NotPlain(type(before[key]).__name__)
            changed[key] = encode(now[key], put)
        except NotPlain as error:
            what = f"{_full(name, key)}{at.removesuffix('.')}"
            raise ValueError(
                f"{what} differs from the network that is built (it is {_short(now[key])}, there "
                f"{_short(before[key]) if key in before else 'absent'}), and a value of type "
                f"{error} cannot be saved. "
                "Give a builder that sets it, or remove it."
            ) from error
    return changed


def _is_plain(value: Any) -> bool:
    try:
        encode(value, lambda tensor: "")
    except NotPlain:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _set(module: nn.Module, name: str, key: str, code: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    if key in _INTERNAL or key.startswith("__"):
        raise ValueError(f"{where} sets {name}.{key}, which is not an attribute that pruning changes")
    if code == {"deleted": True}:
        vars(module).pop(key, None)
        return
    if isinstance(code, list):  # version 1 wrote tuples and lists alike
        vars(module)[key] = code if isinstance(vars(module).get(key), list) else tuple(code)
        return
    try:
        vars(module)[key] = decode(code, lambda kept: tensors[kept].clone())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} sets {name}.{key} to a value that cannot be read: {error}") from error


# -- parameters and buffers ------------------------------------------------------------------------------------


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
    if _order(value) != (list(range(value.dim())) if original is None else _order(original)):
        entry["order"] = _order(value)
    return entry


def _order(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost in memory; ascending where memory is not dense."""
    usual = list(range(tensor.dim()))
    strides = tensor.stride()
    order = sorted(usual, key=lambda d: -strides[d])
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else usual


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


def _tensors(model: nn.Module, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """All parameters and buffers, also those that ``state_dict()`` leaves out, each once."""
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{odd[0]!r} in the model's state_dict is not a tensor; only tensors can be saved")
    for name, tensor in _named_tensors(model):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{name!r} is a sparse, quantized or nested tensor; only dense ones can be saved")
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(model)
        if name not in aliases
    }


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
    shape = entry["shape"] if old is None or "shape" in entry else list(old.shape)
    order = list(range(len(shape))) if old is None or len(shape) != old.dim() else _order(old)
    if "channels_last" in entry:  # version 1
        order = [0, 2, 3, 1] if entry["channels_last"] else [0, 1, 2, 3]
    order = entry.get("order", order)
    new = torch.empty([shape[d] for d in order], dtype=dtype, device="cpu")
    new = new.permute([order.index(d) for d in range(len(shape))])
    requires_grad = entry.get("requires_grad", old is not None and old.requires_grad)
    store[key] = nn.Parameter(new, requires_grad) if store is module._parameters else new


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless the parameters and buffers of ``model`` have exactly the shapes of ``tensors``."""
    own = {name: tensor.shape for name, tensor in _named_tensors(model) if name not in spec["aliases"]}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(KEPT)}
    for name in sorted({*own, *shapes}):
        if own.get(name) != shapes.get(name):
            have, need = (None if s is None else tuple(s) for s in (shapes.get(name), own.get(name)))
            raise ValueError(
                f"another architecture: {name!r} has the shape {have} in {where}, but the network needs {need}"
            )
