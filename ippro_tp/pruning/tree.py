"""A model's modules as plain values: built again from their classes, without constructors and without pickle.

A pruned model differs from what its constructor makes, and the arguments of that call are rarely known. So each
module is written down by the import path of its class and by its attributes, and is made anew as an empty object
of that class. Classes have to be modules of PyTorch; functions that attributes hold are looked up, not called, and
only in the packages that the model's own modules come from.
"""

from __future__ import annotations

import base64
import enum
import functools
import importlib
import math
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_OWN = frozenset(vars(nn.Module())) - {"training"}
_PACKAGES = frozenset({"torch", "torchvision", "timm", "transformers", "ippro_tp"})
Tree = dict[str, Any]


def describe(model: nn.Module) -> Tree:
    """Write down ``model``: its modules, their attributes, and the shapes of their tensors.

    Raises:
        ValueError: something cannot be written down; the message names it.
    """
    names: dict[int, str] = {}
    modules: list[dict[str, Any]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in names:
            modules.append({"name": name, "same": names[id(module)]})
            continue
        names[id(module)] = name
        modules.append({"name": name, "class": _path(type(module), name or "the model")})
    tensors = {id(p): name for name, p in model.named_parameters()}
    writer = _Writer(names, tensors, _packages(modules))
    owners = dict(model.named_modules())
    for entry in modules:
        if "class" in entry:
            module = owners[entry["name"]]
            entry["attributes"] = {
                key: writer.value(value, f"{entry['name'] or type(module).__name__}.{key}")
                for key, value in vars(module).items()
                if key not in _OWN
            }
            entry["parameters"] = {key: _tensor(value) for key, value in module._parameters.items()}
            entry["buffers"] = {key: _tensor(value) for key, value in module._buffers.items()}
            entry["transient"] = sorted(module._non_persistent_buffers_set)
            entry["children"] = [key for key, child in module._modules.items() if child is None]
            if module._forward_hooks or module._forward_pre_hooks:
                owner = entry["name"] or "the model"
                raise ValueError(f"{owner} has forward hooks, which cannot be saved: pass builder=")
    return {"modules": modules}


def rebuild(tree: Mapping[str, Any]) -> nn.Module:
    """Make the model that :func:`describe` wrote down, with tensors that are not filled.

    Raises:
        ValueError: a class is gone, or is no module.
    """
    kinds = {entry["class"]: _found(entry["class"]) for entry in tree["modules"] if "class" in entry}
    odd = [path for path, kind in kinds.items() if not (isinstance(kind, type) and issubclass(kind, nn.Module))]
    if odd:
        raise ValueError(f"{odd[0]} is not a torch.nn.Module")
    packages = _packages(tree["modules"])
    built: dict[str, nn.Module] = {}
    for entry in tree["modules"]:
        name = entry["name"]
        if "same" in entry:
            built[name] = built[entry["same"]]
            continue
        kind = kinds[entry["class"]]
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        for key in entry["children"]:
            module._modules[key] = None
        module._parameters.update({k: _empty(v, True) for k, v in entry["parameters"].items()})
        module._buffers.update({k: _empty(v, False) for k, v in entry["buffers"].items()})
        module._non_persistent_buffers_set.update(entry["transient"])
        built[name] = module
    for name, module in built.items():
        owner, _, key = name.rpartition(".")
        if name:
            built[owner]._modules[key] = module
    reader = _Reader(built, packages)
    for entry in tree["modules"]:
        for key, value in entry.get("attributes", {}).items():
            vars(built[entry["name"]])[key] = reader.value(value)
    return built[""]


def _packages(modules: list[dict[str, Any]]) -> frozenset[str]:
    """Packages of the modules' classes, from which attributes may hold functions and classes too."""
    own = {entry["class"].partition(":")[0].partition(".")[0] for entry in modules if "class" in entry}
    return frozenset(own) | _PACKAGES


# -- values ----------------------------------------------------------------------------------------------------


class _Writer:
    """Turns attributes into JSON values; what is no plain value becomes ``{"$": kind, ...}``."""

    def __init__(
        self, modules: Mapping[int, str], parameters: Mapping[int, str], packages: frozenset[str]
    ) -> None:
        self._modules, self._parameters, self._packages = modules, parameters, packages

    def value(self, value: Any, where: str) -> Any:
        """The JSON value of ``value``, which is kept at ``where``."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        if isinstance(value, nn.Module) and id(value) in self._modules:
            return {"$": "module", "name": self._modules[id(value)]}
        if isinstance(value, nn.Parameter) and id(value) in self._parameters:  # an LSTM lists its own
            return {"$": "parameter", "name": self._parameters[id(value)]}
        if isinstance(value, weakref.ref) and id(value()) in self._parameters:
            return {"$": "reference", "name": self._parameters[id(value())]}
        if isinstance(value, torch.Size):
            return {"$": "size", "items": list(value)}
        if (
            type(value) is torch.Tensor and value.device.type != "meta"
        ):  # kept from a forward pass, or made with it
            return {"$": "tensor", "tensor": _tensor(value), "bytes": _bytes(value)}
        if isinstance(value, (torch.dtype, torch.device)):
            return {"$": type(value).__name__, "value": str(value)}
        if type(value) in (list, tuple, set, frozenset):
            return {"$": type(value).__name__, "items": [self.value(v, where) for v in value]}
        if type(value) in (dict, OrderedDict, defaultdict):
            pairs = [[self.value(k, where), self.value(v, where)] for k, v in value.items()]
            return {"$": "ordered" if type(value) is OrderedDict else "dict", "items": pairs}
        if isinstance(value, functools.partial):
            parts = {"function": value.func, "args": tuple(value.args), "keywords": dict(value.keywords)}
            return {"$": "partial", **{key: self.value(part, where) for key, part in parts.items()}}
        if isinstance(value, types.MethodType) and id(value.__self__) in self._modules:
            return {"$": "method", "name": self._modules[id(value.__self__)], "method": value.__name__}
        if isinstance(value, enum.Enum):
            return {"$": "member", "class": self._known(type(value), where), "name": value.name}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            items = [self.value(v, where) for v in value]
            return {"$": "named", "class": self._known(type(value), where), "items": items}
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return {"$": "object", "path": self._known(value, where)}
        if hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, nn.Module)):
            content = self.value(dict(vars(value)), where)
            return {"$": "instance", "class": self._known(type(value), where), "value": content}
        raise ValueError(f"{where} is of type {type(value).__name__}, which cannot be saved as plain values")

    def _known(self, value: Any, where: str) -> str:
        path = _path(value, where)
        if path.partition(":")[0].partition(".")[0] not in self._packages:
            raise ValueError(f"{where} holds {path}, which belongs to none of the packages of the model")
        return path


class _Reader:
    """Turns the values of :class:`_Writer` back."""

    def __init__(self, modules: Mapping[str, nn.Module], packages: frozenset[str]) -> None:
        self._modules, self._packages = modules, packages

    def value(self, value: Any) -> Any:
        """What was written down as ``value``."""
        if not isinstance(value, dict):
            return value
        reader: dict[str, Callable[[dict[str, Any]], Any]] = {
            "float": lambda v: float(v["value"]),
            "module": lambda v: self._modules[v["name"]],
            "parameter": lambda v: self._parameter(v["name"]),
            "reference": lambda v: weakref.ref(self._parameter(v["name"])),
            "size": lambda v: torch.Size(v["items"]),
            "tensor": lambda v: _filled(v["tensor"], v["bytes"]),
            "dtype": lambda v: getattr(torch, v["value"].removeprefix("torch.")),
            "device": lambda v: torch.device(v["value"]),
            "list": lambda v: self._items(v),
            "tuple": lambda v: tuple(self._items(v)),
            "set": lambda v: set(self._items(v)),
            "frozenset": lambda v: frozenset(self._items(v)),
            "dict": lambda v: {self.value(k): self.value(x) for k, x in v["items"]},
            "ordered": lambda v: OrderedDict((self.value(k), self.value(x)) for k, x in v["items"]),
            "partial": lambda v: functools.partial(
                self.value(v["function"]), *self.value(v["args"]), **self.value(v["keywords"])
            ),
            "method": lambda v: getattr(self._modules[v["name"]], v["method"]),
            "member": lambda v: self._class(v)[v["name"]],
            "named": lambda v: tuple.__new__(self._class(v), self._items(v)),
            "object": lambda v: _resolve(v["path"], self._packages),
            "instance": self._instance,
        }
        return reader[value["$"]](value)

    def _parameter(self, name: str) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        found = self._modules[owner]._parameters[leaf]
        if found is None:
            raise ValueError(f"{name} is no parameter")
        return found

    def _items(self, value: dict[str, Any]) -> list[Any]:
        return [self.value(v) for v in value["items"]]

    def _class(self, value: dict[str, Any]) -> Any:
        return _resolve(value["class"], self._packages)

    def _instance(self, value: dict[str, Any]) -> Any:
        kind = self._class(value)
        made = object.__new__(kind)
        vars(made).update(self.value(value["value"]))
        return made


def _path(value: Any, where: str) -> str:
    """Import path of a class or function, ``module:qualified name``."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module == "__main__":
        raise ValueError(
            f"{where} is of the class {name} of the running script, which no other process can import: move it "
            "into a module, or pass builder="
        )
    path = f"{module}:{name}"
    try:
        if module and name and _found(path) is value:
            return path
    except ValueError:
        pass
    raise ValueError(f"{where} is or holds {name or value!r}, which cannot be imported as {path}: pass builder=")


def _resolve(path: str, packages: frozenset[str]) -> Any:
    package = path.partition(":")[0].partition(".")[0]
    if package not in packages:
        raise ValueError(f"{path} belongs to none of the packages {', '.join(sorted(packages))}")
    return _found(path)


def _found(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported ({error}); the model needs it") from error
    return value


# -- tensors ---------------------------------------------------------------------------------------------------


def _tensor(value: torch.Tensor | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _bytes(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode("ascii")


def _filled(entry: Mapping[str, Any], text: str) -> torch.Tensor:
    dtype = getattr(torch, entry["dtype"])
    content = bytearray(base64.b64decode(text))
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.clone().reshape(entry["shape"])


def _empty(entry: Mapping[str, Any] | None, parameter: bool) -> Any:
    if entry is None:
        return None
    tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    if not parameter:
        return tensor
    return nn.Parameter(tensor, tensor.is_floating_point() or tensor.is_complex())
