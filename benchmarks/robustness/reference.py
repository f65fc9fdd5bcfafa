"""The slow references: scores by autograd, sample by sample, and the original with removed channels silenced."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from benchmarks.robustness.line import Probe, call, count, picked
from ippro_tp.graph.groups import read_group

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
TAPPED = (_ConvNd, nn.Linear, nn.Embedding, *NORMS)


def is_turned_linear(module: nn.Module) -> bool:
    """Whether a layer is Hugging Face's ``Conv1D``: a Linear layer whose weight is ``(inputs, outputs)``."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def channel_axis(module: nn.Module, tensor: Tensor) -> int:
    """Axis of the channels in a layer's input or output, from the end."""
    if isinstance(module, _ConvNd):
        return -(len(module.kernel_size) + 1)
    return 1 - tensor.dim() if isinstance(module, NORMS) else -1


def is_tapped(module: nn.Module) -> bool:
    """Whether the reference knows a layer's channels."""
    return isinstance(module, TAPPED) or is_turned_linear(module)


class Offsets:
    """F.grad of each channel of layers, for one sample.

    By hooks on what layers return; of norms, which may apply an activation as well, from their parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules() if is_tapped(module)}
        self._affine = {m: n for m, n in self._names.items() if isinstance(m, NORMS) and m.weight is not None}
        self._hooked: dict[str, Tensor] = {}

    def __enter__(self) -> Offsets:
        self._handles = [m.register_forward_hook(self._see) for m in self._names if m not in self._affine]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Begin another sample."""
        self._hooked = {}
        for module in self._affine:
            module.zero_grad(set_to_none=True)

    @property
    def sums(self) -> dict[str, Tensor]:
        """``(channels,)`` float64 for each layer that was reached."""
        found = dict(self._hooked)
        for module, name in self._affine.items():
            parts = [
                p.detach().double() * p.grad.double() for p in (module.weight, module.bias) if p.grad is not None
            ]
            if parts:
                found[name] = sum(parts)
        return found

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._names[module]
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        value, axis = output.detach().clone(), channel_axis(module, output)

        def add(grad: Tensor) -> None:
            others = [a for a in range(grad.dim()) if a != axis % grad.dim()]
            product = grad.double() * value.double()
            self._hooked[name] = self._hooked.get(name, 0) + (product.sum(others) if others else product)

        output.register_hook(add)


def expected_scores(
    model: nn.Module, groups: Iterable[Any], inputs: Any, probe: Probe, stood_for: Collection[str]
) -> dict[str, Tensor]:
    """Mean over samples of abs(sum over producers of F.grad), group by group, samples one by one.

    ``stood_for`` names the layers that a norm stands for: the norm's parameters are F.
    Groups with producers of other kinds than convolutions, Linear, embeddings and channel norms are left out.
    """
    records = [read_group(group) for group in groups]
    modules = dict(model.named_modules())
    records = [r.joined for r in records if r.producers]
    records = [r for r in records if all(is_tapped(modules[p.name]) for p in r.producers)]
    totals = {record.key: torch.zeros(record.width, dtype=torch.float64) for record in records}
    samples = count(inputs)
    with Offsets(model) as offsets, torch.enable_grad():
        for at in range(samples):
            offsets.clear()
            probe(call(model, picked(inputs, at, at + 1)), at).backward()
            sums = offsets.sums
            for record in records:
                t = torch.zeros(record.width, dtype=torch.float64)
                for layer in record.producers:
                    if layer.name in sums and layer.name not in stood_for:
                        t.index_add_(0, layer.root, sums[layer.name][layer.index])
                totals[record.key] += t.abs() / samples
    model.zero_grad(set_to_none=True)
    for record in records:
        if record.tied is not None:
            totals[record.key] = totals[record.key][record.tied]
    return totals


# -- the original, silenced --------------------------------------------------------------------------------------


class NoReferenceError(Exception):
    """The pruned model cannot be compared with the original; says why."""


def _found(values: Tensor, table: Tensor, what: str) -> Tensor:
    """Flat positions of ``values`` in ``table``."""
    if values.is_complex():
        raise NoReferenceError(f"{what} holds complex numbers")
    ordered, order = table.flatten().sort()
    at = torch.searchsorted(ordered, values.contiguous()).clamp_max(len(ordered) - 1)
    if not torch.equal(ordered[at], values):
        raise ValueError(f"{what} holds numbers that are not the original's")
    if len(ordered) > 1 and (ordered[(at + 1).clamp_max(len(ordered) - 1)] == values)[at + 1 < len(ordered)].any():
        raise NoReferenceError(f"{what} holds equal numbers")
    return order[at]


def _kept_of(name: str, before: nn.Module, after: nn.Module) -> tuple[Tensor, Tensor]:
    """Output and input channels of a layer that are left, told from the numbers in its weight.

    A convolution with groups has other input channels in each: those are told from its first filter.
    """
    old, new = before.weight.detach(), after.weight.detach()
    if isinstance(before, _ConvTransposeNd) or is_turned_linear(before):
        old, new = old.transpose(0, 1), new.transpose(0, 1)
    first_old, first_new = old.flatten(2)[..., 0] if old.dim() > 2 else old, new
    first_new = new.flatten(2)[..., 0] if new.dim() > 2 else new
    outs = _found(first_new[:, 0], first_old, name) // first_old.shape[1]
    ins = _found(first_new[0], first_old, name) % first_old.shape[1]
    if not torch.equal(old[outs][:, ins], new):
        raise ValueError(f"{name} holds other numbers than the rows and columns of the original")
    groups = getattr(before, "groups", 1)
    if groups > 1 and not isinstance(before, _ConvTransposeNd):
        leads = outs.view(after.groups, -1)[:, 0] // (len(old) // groups)
        ins = (leads[:, None] * old.shape[1] + ins).flatten()
    return outs, ins


def _alone(module: nn.Module) -> bool:
    """Whether no parameters but its own take part in what a module computes; activations may."""
    return not any(True for child in module.children() for _ in child.parameters())


def _own_forward(module: nn.Module) -> bool:
    """Whether a layer does something of its own, such as standardising its weight over the inputs it has."""
    return type(module).forward not in {
        kind.forward for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules")
    } and not is_turned_linear(module)


class Silenced:
    """The original model in which channels that a pruned one lost are zero wherever a layer writes or reads them.

    Layers with nothing but vectors for parameters (norms, scales), and convolutions and Linear layers with a
    forward pass of their own, work on the remaining channels alone.
    """

    def __init__(self, original: nn.Module, pruned: nn.Module) -> None:
        self._handles: list[Any] = []
        try:
            self._hook(original, dict(pruned.named_modules()))
        except Exception:
            self.remove()
            raise

    def _hook(self, original: nn.Module, after: dict[str, nn.Module]) -> None:
        for name, module in original.named_modules():
            other = after[name]
            own = dict(module.named_parameters(recurse=False))
            if not own or all(p.shape == dict(other.named_parameters())[n].shape for n, p in own.items()):
                continue
            if isinstance(module, (_ConvNd, nn.Linear, nn.Embedding)) or is_turned_linear(module):
                self._mask(name, module, other)
            elif all(p.squeeze().dim() <= 1 for p in own.values()) and _alone(module):
                self._replace(name, module, other)
            elif isinstance(module, nn.MultiheadAttention):
                raise NoReferenceError(f"{name} is an nn.MultiheadAttention")

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _mask(self, name: str, module: nn.Module, other: nn.Module) -> None:
        outs, ins = _kept_of(name, module, other)
        if isinstance(module, nn.Embedding):
            outs, ins = ins, outs
        if not isinstance(module, nn.Embedding) and _own_forward(module):
            self._narrow(module, other, outs, ins)
            return
        turned = isinstance(module, (_ConvTransposeNd, nn.Embedding)) or is_turned_linear(module)
        rows = module.weight.shape[1 if turned else 0]
        write = torch.zeros(rows).index_fill_(0, outs, 1)

        def silence(tensor: Tensor, keep: Tensor) -> Tensor:
            axis = channel_axis(module, tensor) % tensor.dim()
            return tensor * keep.to(tensor).view([-1 if a == axis else 1 for a in range(tensor.dim())])

        self._handles.append(module.register_forward_hook(lambda m, a, y: silence(y, write)))
        if not isinstance(module, nn.Embedding) and not (turned and getattr(module, "groups", 1) > 1):
            columns = module.weight.shape[0 if turned else 1] * getattr(module, "groups", 1)
            read = torch.zeros(columns).index_fill_(0, ins, 1)
            self._handles.append(
                module.register_forward_pre_hook(lambda m, a: (silence(a[0], read), *a[1:]) if a else None)
            )

    def _narrow(self, module: nn.Module, other: nn.Module, outs: Tensor, ins: Tensor) -> None:
        def narrow(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            narrowed = other(args[0].index_select(channel_axis(m, args[0]) % args[0].dim(), ins), *args[1:])
            return torch.zeros_like(output).index_copy_(channel_axis(m, output) % output.dim(), outs, narrowed)

        self._handles.append(module.register_forward_hook(narrow))

    def _replace(self, name: str, module: nn.Module, other: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        first = next(n for n, p in own.items() if p.shape != dict(other.named_parameters())[n].shape)
        table = own[first].detach().squeeze()
        kept = _found(dict(other.named_parameters())[first].detach().flatten(), table, name)

        def narrow(m: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = args[0]
            fits = [a for a in range(1, x.dim()) if x.shape[a] == len(table)]
            axis = x.dim() - 1 if isinstance(m, nn.LayerNorm) and x.dim() - 1 in fits else (fits or [None])[0]
            if axis is None:
                return None
            narrowed = other(x.index_select(axis, kept), *args[1:])
            return torch.zeros_like(output).index_copy_(axis, kept, narrowed)

        self._handles.append(module.register_forward_hook(narrow))


@torch.no_grad()
def silenced_outputs(original: nn.Module, pruned: nn.Module, inputs: Any) -> Any:
    """Outputs of the original without what the pruned model lost.

    Raises:
        NoReferenceError: which channels are left cannot be told.
        ValueError: the pruned model's numbers are not the original's.
    """
    silenced, fast = Silenced(original, pruned), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nested tensors know no product with a mask
    try:
        return call(original, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        silenced.remove()
