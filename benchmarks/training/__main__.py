"""Command line: ``python -m benchmarks.training --net vit --data-dir DIR --out FILE.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import timm
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.errors import UsageError
from benchmarks.models.cifar import NETWORKS
from benchmarks.training.config import TrainingConfig
from benchmarks.training.data import CLASSES, load
from benchmarks.training.loop import CHANNELS_LAST, accuracy, train


def run(config: TrainingConfig) -> dict:
    """Train, test once on all test images, write weights and JSON; return what the JSON holds.

    Raises:
        UsageError: The network is unknown, the images are not there, or training diverged.
    """
    begin = time.perf_counter()
    if config.net not in NETWORKS:
        raise UsageError(f"unknown --net {config.net!r}; known: {', '.join(NETWORKS)}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device; give --device cpu")
    device = torch.device(config.device)
    train_data, test_data = load(config.data_dir, config.cache_dir, device)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    model = NETWORKS[config.net](num_classes=CLASSES).to(device)
    if config.net in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    reserve = min(10.0, 3 * config.minutes)  # for the test and for writing
    seconds = 60 * config.minutes - (time.perf_counter() - begin) - reserve if config.minutes else 0.0
    if config.minutes and seconds <= 0:
        raise UsageError(f"--minutes {config.minutes} were over before training began")
    model, done = train(model, train_data, config, seconds)
    rounded = round_weights(model)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in rounded.items()}, config.out)
    model.load_state_dict(rounded)  # the accuracy is that of what was written
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    record = {
        "net": config.net,
        "test_accuracy": accuracy(model, test_data),
        "test_images": len(test_data),
        "train_images": len(train_data),
        "parameters": sum(p.numel() for p in model.parameters()),
        **done,
        "seconds": round(time.perf_counter() - begin, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "config": settings,
    }
    config.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{config.net}: {100 * record['test_accuracy']:.2f} % after {done['epochs_done']} epochs", flush=True)
    return record


def round_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict in float16, but for BatchNorm, whose statistics have a wider range."""
    kept = {f"{n}." for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    state = {}
    for name, tensor in model.state_dict().items():
        rounded = tensor.dtype == torch.float32 and name.rpartition(".")[0] + "." not in kept
        state[name] = tensor.half() if rounded else tensor
    return state


def main(arguments: list[str] | None = None) -> int:
    """Run; bad input ends in one line on stderr and exit code 2."""
    config = tyro.cli(TrainingConfig, prog="python -m benchmarks.training", args=arguments)
    try:
        run(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
