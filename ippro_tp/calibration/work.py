"""MACs of each layer, and of products of activations for the layers that make them: one counted forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..records import Work
from ..tracing.flops import MacCounter, counting
from ..tracing.rewinding import untouched
from .guard import preserved


def measure_work(model: nn.Module, args: Any, kwargs: dict[str, Any], layers: Iterable[str]) -> Work:
    """Run the model once, in eval mode, and count what each layer does.

    Products outside of ``layers``, as those of attention, belong to the layers that their operands come from, as
    the autograd graph tells. The model and the random state are left as they are.

    Args:
        model: on any device.
        args: positional arguments of the call; MACs are those of the whole batch.
        kwargs: keyword arguments.
        layers: names of layers that count as one: what runs inside is theirs.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = {p.device.index or 0 for p, _ in flags if p.device.type == "cuda"}
    with untouched(model), preserved(model), torch.random.fork_rng(devices=devices), torch.inference_mode(False):
        model.eval()
        for p, _ in flags:
            p.requires_grad_(p.is_floating_point() or p.is_complex())
        with torch.enable_grad(), counting(model) as counter, _Products(model, counter, layers) as products:
            model(*args, **kwargs)
    inside, shares = Counter(products.borrowed), dict(products.shares)
    for name, macs in counter.by_layer.items():
        if (owner := products.owner(name)) is not None:
            inside[owner] += macs
    for name, macs in counter.products.items():
        owner = products.owner(name)
        if owner is not None and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
            inside[owner] -= macs
            shares[owner] = shares.get(owner, 0.0) + macs
    return Work(counter.total, dict(inside), shares)


class _Products(TorchFunctionMode):
    """Sees products outside of the layers, and whose channels go into them.

    Attributes:
        shares: MACs of products by the layer that makes an operand; two operands count half each.
        borrowed: MACs of calls with a layer's weight, ``F.linear(x, self.qkv.weight)``, by layer.
    """

    def __init__(self, model: nn.Module, counter: MacCounter, layers: Iterable[str]) -> None:
        super().__init__()
        self.shares: dict[str, float] = {}
        self.borrowed: dict[str, int] = {}
        self._counter = counter
        self._layers = {name: model.get_submodule(name) for name in layers}
        self._weights: dict[Tensor, str] = {
            p: name for name, m in self._layers.items() for p in m.parameters(recurse=False)
        }
        self._made_by: dict[Any, str] = {}
        self._products: set[Any] = set()
        self._owners: dict[str, str | None] = {}
        self._handles = ExitStack()

    def __enter__(self) -> _Products:
        for name, module in self._layers.items():
            self._handles.callback(module.register_forward_hook(self._note(name)).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._handles.close()

    def owner(self, module: str) -> str | None:
        """The layer that ``module`` is, or is a part of."""
        if module not in self._owners:
            parts = module.split(".")
            names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            self._owners[module] = next((name for name in names if name in self._layers), None)
        return self._owners[module]

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    self._made_by[leaf.grad_fn] = name

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.owner(self._counter.inside) is not None:
            return func(*args, **kwargs)
        self._counter.settle()
        output = func(*args, **kwargs)
        macs = self._counter.settle()
        if macs:
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._attribute(macs, operands)
            self._products.update(
                leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn
            )
        return output

    def _attribute(self, macs: int, operands: list[Tensor]) -> None:
        weight = next((self._weights[t] for t in operands if t in self._weights), None)
        if weight is not None:
            self.borrowed[weight] = self.borrowed.get(weight, 0) + macs
            return
        makers = [found for t in operands if (found := set(self._makers(t)))]
        for found in makers:
            for name in found:
                self.shares[name] = self.shares.get(name, 0.0) + macs / len(makers) / len(found)

    def _makers(self, tensor: Tensor) -> Iterator[str]:
        """Layers whose outputs reach ``tensor`` through no other layer or product."""
        pending, seen = [tensor.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._made_by:
                yield self._made_by[node]
            elif node not in self._products:
                pending += [before for before, _ in node.next_functions]
