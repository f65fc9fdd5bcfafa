"""nn.MultiheadAttention taken apart: its four projections are watched and refitted like Linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PARTS = ("q", "k", "v")


def can_be_taken_apart(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.MultiheadAttention`` that runs as torch wrote it."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and not any(map(parametrize.is_parametrized, (module, module.out_proj)))
    )


class Stand(Protocol):
    """What stands for a module while a model runs: the Linear layers that it is made of, over its own memory."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """By the part of the module that each is; ``""`` for all of it."""

    @property
    def forward(self) -> Callable[..., Any]:
        """Instead of the module's own."""


class Projections:
    """The query, key and value projections of an ``nn.MultiheadAttention`` as Linear layers over its own memory.

    Made anew after a cut, which replaces the weights.

    Args:
        attention: see :func:`can_be_taken_apart`.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.module = attention
        packed, bias = attention.in_proj_weight, attention.in_proj_bias
        weights = (
            packed.chunk(3)
            if packed is not None
            else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.layers = {part: over(w, b) for part, w, b in zip(PARTS, weights, biases, strict=True)}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives, with each projection called as a layer."""
        attention = self.module
        inputs = [self.layers[part](x) for part, x in zip(PARTS, (query, key, value), strict=True)]
        with _without_projections(attention):
            mixed, weights = nn.MultiheadAttention.forward(attention, *inputs, *args, **kwargs)
        return attention.out_proj(mixed), weights


@contextmanager
def taken_apart(projections: Sequence[Stand]) -> Iterator[None]:
    """Let each module run by way of what stands for it."""
    modules = [p.module for p in projections]
    for module, parts in zip(modules, projections, strict=True):
        module.__dict__["forward"] = parts.forward
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def over(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer over the memory of ``weight``, ``(outputs, inputs)``, and ``bias``."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


@contextmanager
def _without_projections(attention: nn.MultiheadAttention) -> Iterator[None]:
    """Identities in place of all projections: a product with one is exact."""
    weight = attention.out_proj.weight
    one = nn.Parameter(torch.eye(attention.embed_dim, dtype=weight.dtype, device=weight.device), False)
    owners = (attention, attention.out_proj)
    held = [dict(owner._parameters) for owner in owners]
    try:
        attention.out_proj._parameters.update(weight=one, bias=None)
        if attention._parameters["in_proj_weight"] is not None:
            attention._parameters["in_proj_weight"] = nn.Parameter(one.detach().repeat(3, 1), False)
        else:
            attention._parameters.update(q_proj_weight=one, k_proj_weight=one, v_proj_weight=one)
        attention._parameters["in_proj_bias"] = None
        yield
    finally:
        for owner, parameters in zip(owners, held, strict=True):
            owner._parameters.update(parameters)
