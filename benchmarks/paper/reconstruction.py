"""``reconstruction``: how near layers of a pruned net come to what they gave, with and without compensation.

Weights are random unless ``--pretrained``: the question is whether held-out reconstruction improves in every layer
of every kind of network, and what it costs, not how accurate the networks are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import timm
import torch
import torch_pruning as tp
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.errors import UsageError
from benchmarks.harness.cells import environment, write_json
from benchmarks.harness.prune import size
from benchmarks.tasks.imagefolder import FolderImages
from ippro_tp import Compensation, attention_heads, update_attention
from ippro_tp.compensation.cutlayer import CutLayer

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
MODELS = ("resnet50", "mobilenetv2_100", "densenet121", "convnext_tiny", "vit_small_patch16_224", "regnety_004")


@dataclass(frozen=True)
class ReconstructionConfig:
    """Prune timm models with and without compensation; compare each layer's output with the unpruned model's."""

    models: tuple[str, ...] = MODELS
    """Names of timm models."""
    pretrained: bool = False
    """Download weights."""
    data_dir: Path | None = None
    """Folder with one folder of images per class; without it, inputs are smooth noise."""
    img_size: int = 96
    """Side of the square input."""
    images: int = 128
    """Calibration images."""
    heldout_images: int = 64
    """Images on which layers are compared; disjoint from the others."""
    pruning_ratio: float = 0.3
    """Channels to remove, uniformly; 0.3 leaves about half of the MACs."""
    seed: int = 0
    """Of weights and images."""
    threads: int = 0
    """Threads of PyTorch; 0 for its default."""
    out: Path = Path("runs/reconstruction")
    """Where reconstruction.json goes."""


def run(config: ReconstructionConfig) -> list[dict]:
    """Print a table, write the records, return them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = []
    for name in config.models:
        if name not in timm.list_models():
            raise UsageError(f"timm has no model {name!r}; `timm.list_models()` names all")
        rows.append(_one(config, name))
        print(markdown(rows[-1:]), flush=True)
    write_json(config.out / "reconstruction.json", {"rows": rows, "environment": environment()})
    print(markdown(rows))
    return rows


def _one(config: ReconstructionConfig, name: str) -> dict:
    torch.manual_seed(config.seed)
    options = {"img_size": config.img_size} if "vit" in name else {}
    model = timm.create_model(name, pretrained=config.pretrained, **options)
    images = _images(config)
    if not config.pretrained:
        _settle(model, images[: config.images])
    calibration, heldout = images[: config.images], images[config.images :]
    networks = {"uncut": model.eval(), "plain": copy.deepcopy(model), "compensated": copy.deepcopy(model)}
    left = _cut(_pruner(networks["plain"], calibration[:1], config.pruning_ratio))
    pruner = _pruner(networks["compensated"], calibration[:1], config.pruning_ratio)
    compensation = Compensation().calibrate(pruner, calibration.split(32), progress=False)
    begin = time.process_time(), time.perf_counter()
    report = compensation.step(pruner)
    seconds = time.process_time() - begin[0], time.perf_counter() - begin[1]
    for network in networks.values():
        network.eval()
    outputs = {kind: _outputs(network, heldout) for kind, network in networks.items()}
    plain_seconds = _time(lambda: model(calibration))
    layers = []
    for row in report.rows:
        if not row.removed or row.skipped:
            continue
        plain, ours = (outputs[kind][row.name] for kind in ("plain", "compensated"))
        layer = networks["uncut"].get_submodule(row.name)
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        wanted = outputs["uncut"][row.name].index_select(axis, left[row.name])
        power = float(wanted.square().sum())
        layers.append(
            {
                "layer": row.name,
                "plain": float((plain - wanted).square().sum()) / power,
                "compensated": float((ours - wanted).square().sum()) / power,
            }
        )
    macs = [size(networks[kind], calibration[:1])[0] for kind in ("plain", "uncut")]
    return {
        "model": name,
        "macs_fraction": macs[0] / macs[1],
        "layers": layers,
        "skipped": [f"{row.name}: {row.skipped}" for row in report.rows if row.skipped],
        "step_cpu_seconds": seconds[0],
        "step_seconds": seconds[1],
        "forward_seconds": plain_seconds,
    }


def _images(config: ReconstructionConfig) -> Tensor:
    count = config.images + config.heldout_images
    if config.data_dir is None:
        generator = torch.Generator().manual_seed(config.seed)
        coarse = torch.randn(count, 3, config.img_size // 8, config.img_size // 8, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=config.img_size, mode="bilinear")
        return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)
    transform = timm.data.create_transform((3, config.img_size, config.img_size), crop_pct=1.0)
    folder = FolderImages(config.data_dir, transform, 1000)
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(config.seed))
    if len(order) < count:
        raise UsageError(f"{config.data_dir} holds {len(order)} images; {count} are needed")
    return folder.batch(order[:count])[0]


def _settle(model: nn.Module, images: Tensor) -> None:
    """Give random weights BatchNorm statistics that fit them; otherwise activations fade from layer to layer."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        torch.optim.swa_utils.update_bn(images.split(32), model)


def _pruner(model: nn.Module, example: Tensor, ratio: float) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(
        model,
        (example,),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.get_classifier()],
        num_heads=attention_heads(model),
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each convolution and Linear layer gives."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[name] = output.detach()

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _cut(pruner: tp.pruner.BasePruner) -> dict[str, Tensor]:
    """Prune without compensation; return which outputs of each layer are left."""
    names = pruner.DG._module2name
    layers = {
        m: CutLayer(names[m], m, None) for m in pruner.model.modules() if isinstance(m, LAYERS) and m in names
    }
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            if dep.target.module in layers and idxs and pruner.DG.is_out_channel_pruning_fn(dep.handler):
                layers[dep.target.module].remove_outputs(idxs)
        group.prune()
    update_attention(pruner)
    return {layer.name: layer.outputs for layer in layers.values()}


def _time(function: Callable[[], object]) -> float:
    with torch.no_grad():
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin


def markdown(rows: list[dict]) -> str:
    """Return the table of records of :func:`run`."""
    body = []
    for row in rows:
        ratios = [x["compensated"] / x["plain"] for x in row["layers"] if x["plain"] > 0]
        body.append(
            [
                row["model"],
                f"{row['macs_fraction']:.2f}",
                len(row["layers"]),
                sum(ratio < 1 for ratio in ratios),
                f"{median(x['plain'] for x in row['layers']):.1%}",
                f"{median(x['compensated'] for x in row['layers']):.1%}",
                f"{max(ratios):.2f}",
                len(row["skipped"]),
                f"{row['step_cpu_seconds']:.1f}",
                f"{row['forward_seconds']:.1f}",
            ]
        )
    head = ["model", "MACs", "layers", "better", "error, plain", "compensated", "largest ratio", "skipped"]
    return tabulate(body, [*head, "step, CPU s", "forward, s"], tablefmt="github", disable_numparse=True)
