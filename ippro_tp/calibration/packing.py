"""Records of groups, as plain types and tensors, and found again in a group that is rooted elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import NotCalibratedError
from ..records import GroupRecord, Layer


def pack_record(record: GroupRecord) -> dict[str, Any]:
    """What :func:`unpack_record` takes."""

    def pack(layers: Iterable[Layer]) -> list[dict[str, Any]]:
        return [{"name": x.name, "index": x.index, "root": x.root, "channels": x.channels} for x in layers]

    return {
        "key": record.key,
        "width": record.width,
        "producers": pack(record.producers),
        "consumers": pack(record.consumers),
        "problems": list(record.problems),
        "members": list(record.members),
        "tied": record.tied,
        "others": pack(record.others),
    }


def unpack_record(packed: Mapping[str, Any]) -> GroupRecord:
    """What :func:`pack_record` was given."""
    return GroupRecord(
        packed["key"],
        packed["width"],
        tuple(Layer(**x) for x in packed["producers"]),
        tuple(Layer(**x) for x in packed["consumers"]),
        tuple(packed["problems"]),
        tuple(packed.get("members", ())),
        packed.get("tied"),
        tuple(Layer(**x) for x in packed.get("others", ())),
    )


def match(record: GroupRecord, current: GroupRecord) -> Tensor:
    """Positions in ``record`` of the channels of ``current``, a group of the same layers rooted elsewhere."""
    positions = torch.full((current.width,), -1, dtype=torch.long)
    known = {layer.name: layer for layer in record.producers}
    for layer in current.producers:
        then = known[layer.name]
        lookup = torch.full((layer.channels,), -1, dtype=torch.long)
        lookup[then.index] = then.root
        positions[layer.root] = torch.maximum(positions[layer.root], lookup[layer.index])
    if (positions < 0).any():
        raise NotCalibratedError(
            f"group {current.key!r} holds channels that group {record.key!r} of the calibration does not. "
            "Calibrate with the pruner (or graph) that asks for scores."
        )
    return positions
