"""Running a model once, on a copy and without fused kernels, to follow its channels or to leave some out."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layers import forget_caches, unfused
from . import contractions, moves, normalisations, reductions  # noqa: F401  # they register rules
from .labels import Facts
from .matrices import note_call
from .provenance import Provenance, ReplayError

OUTPUT = "its channels are the model's output"
ForwardFn = Callable[[nn.Module, Any], Any]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and outputs of Hugging Face models."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "tensors") and isinstance(value.tensors, Tensor):  # NestedTensor of DETR, ImageList
        yield value.tensors


def call(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Call ``model`` with a tensor, a tuple of positional or a dict of keyword arguments."""
    if forward_fn is not None:
        return forward_fn(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, list):  # Torch-Pruning unpacks it; a detector takes it as it is
        try:
            return model(*inputs)
        except (TypeError, AttributeError):
            return model(inputs)
    return model(inputs)


@contextmanager
def plain_operations() -> Iterator[None]:
    """No fused kernels inside: attention, Transformer layers and recurrent nets run as products and sums."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(unfused())
        yield


def run(
    model: nn.Module,
    inputs: Any,
    facts: Facts,
    *,
    removed: Tensor | None = None,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    follow: bool = False,
) -> list[Tensor]:
    """Run ``model`` once, a copy that may be changed, and add to ``facts`` what it shows.

    Args:
        model: the copy.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        facts: what is found is added here.
        forward_fn: ``(model, inputs) -> outputs``, instead of a plain call.
        output_transform: picks the outputs that matter.
        removed: ``(labels,)`` boolean; run as if these channels were not there, and add nothing.
        follow: with ``removed``, follow the channels again even if ``facts`` say where each operation reads them.

    Returns:
        All tensors of the output.
    """
    if removed is not None and not follow:
        with (
            contextlib.suppress(ReplayError, IndexError),
            plain_operations(),
            Provenance(facts, removed, replaying=True),
        ):
            out = call(model, inputs, forward_fn)
            return list(tensors_in(out if output_transform is None else output_transform(out)))
    mode = Provenance(facts, removed)
    mode.register(model)
    hooks = []

    def leave(_: nn.Module, args: Any, out: Any) -> None:
        name = mode.module.pop()
        if removed is None:
            with torch._C._DisableTorchDispatch():  # what is computed here is not the model's
                note_call(mode, name, args, out)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: mode.module.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with plain_operations(), mode:
            out = call(model, inputs, forward_fn)
            if output_transform is not None:
                out = output_transform(out)
        outputs = list(tensors_in(out))
        for tensor in outputs:
            for plane in mode.planes(tensor):
                mode.fix(plane, OUTPUT)
        return outputs
    finally:
        for hook in hooks:
            hook.remove()


def fresh_copy(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """A copy in eval mode, without tensors that a forward pass left on modules.

    Hooks come along: weights can be made by one (``torch.nn.utils.weight_norm``), and so can what a model of
    Hugging Face's returns.

    Args:
        model: what is copied.
        shared: keep the parameters of ``model``, which are not to be changed in place.
    """
    tensors = tuple(model.parameters()) if shared else ()
    made = copy.deepcopy(model, {id(t): t for t in tensors}).eval()
    for module in made.modules():
        forget_caches(module)
    return made
