"""Whether a model is the one that was calibrated, or an equal one: a few of its weights tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..records import GroupRecord

SAMPLED = 8
CAST = 2.0**-6
"""Relative difference of a weight that a cast to bfloat16 can make, and then some."""


def weights_of(model: nn.Module, records: Iterable[GroupRecord]) -> dict[str, Tensor]:
    """The weights of all producers, by layer."""
    names = {layer.name for record in records for layer in record.producers}
    modules = dict(model.named_modules())
    weights = {name: getattr(modules.get(name), "weight", None) for name in names}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some elements of each weight, float32, on the CPU."""
    with torch.no_grad():
        picked = {name: _sample(weight) for name, weight in weights.items() if weight.numel()}
        if not picked:
            return {}
        device = next(iter(picked.values())).device
        together = torch.cat([part.to(device) for part in picked.values()]).cpu()  # one copy, not one a layer
        return dict(zip(picked, together.split([len(part) for part in picked.values()]), strict=True))


def different(known: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """A layer whose weight is not the known one; casts to other float types are no difference.

    Args:
        known: a :func:`fingerprint`.
        weights: of the layers of a model; other layers than the known ones are not looked at.
    """
    now = fingerprint({name: weight for name, weight in weights.items() if name in known})
    for name in sorted(now):
        a, b = known[name].double(), now[name].double()
        if a.shape != b.shape or bool(((a - b).abs() > CAST * a.abs().clamp_min(1e-6)).any()):
            return name
    return None


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLED, flat.numel())).long()
    return flat[places.to(flat.device)].float()
