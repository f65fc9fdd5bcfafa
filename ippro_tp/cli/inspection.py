"""``inspect``: what Torch-Pruning sees of a network: groups, widths, MACs, and what is left whole and why."""

from __future__ import annotations

import json

import torch
from tabulate import tabulate

from ..pruning.inspection import Inspection, inspect_model
from .config import InspectConfig, PruneRunConfig
from .networks import build_network
from .plan import explained


def run(config: InspectConfig) -> None:
    """Print the groups of a network, or write them as JSON."""
    flags = PruneRunConfig(
        model=config.model,
        library=config.library,
        task=config.task,
        img_size=config.img_size,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained,
    )
    classes = [f"class {number}" for number in range(config.num_classes)]
    network = build_network(flags, classes, any_classes=True)
    example = network.example
    if config.task == "segmentation":
        size = config.img_size or 224
        example = torch.zeros(1, 3, size, size)
    with explained(config.model):
        found = inspect_model(network.model, example)
    if config.json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    print(text(found))


def text(found: Inspection) -> str:
    """Return a table of groups and the reasons of those that are left whole."""
    rows = [
        [
            group.key,
            group.width,
            group.units,
            f"{group.macs / found.macs:.1%}",
            _layers(group.layers),
        ]
        for group in found.groups
    ]
    head = ["group", "channels", "units", "MACs", "layers whose outputs it holds"]
    parts = [tabulate(rows, head, tablefmt="simple", disable_numparse=True)]
    if found.left_whole:
        parts.append("left whole:\n" + "\n".join(f"  {key}: {why}" for key, why in found.left_whole.items()))
    parts.append(
        f"{type(found.model).__name__}: {found.macs / 1e6:.4g} M MACs, {found.params / 1e6:.4g} M parameters; "
        f"{len(found.groups)} groups can be pruned, {len(found.left_whole)} are left whole. MACs: of the "
        "layers that a group's channels enter or leave; layers between two groups count for both."
    )
    return "\n\n".join(parts)


def _layers(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", +{len(names) - 3}" if len(names) > 3 else "")
