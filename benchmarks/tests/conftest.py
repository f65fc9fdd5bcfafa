from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.harness.finetune import Recipe
from benchmarks.models.small_resnet import SmallResNet
from benchmarks.tasks import digits
from benchmarks.tasks.base import Task, TensorImages


@pytest.fixture(autouse=True, scope="session")  # fixtures of modules are to have it too
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_net() -> nn.Module:
    """A residual net with BatchNorm whose statistics and scales are not the trivial ones."""
    torch.manual_seed(0)
    model = SmallResNet(num_classes=4, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def small_task(small_net) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    data = TensorImages(images, labels, (0.5,), (0.5,))
    return Task("toy", "net", small_net, data.batch(torch.tensor([0]))[0], data, data, 4, ignored=("fc",))


@pytest.fixture
def quick_digits(monkeypatch, tmp_path):
    """The digits task with a network of one epoch."""
    built = digits.build
    monkeypatch.setattr(digits, "build", lambda config: built(config, Recipe(epochs=1, learning_rate=0.03)))
    common = [
        "compare",
        "--task",
        "digits",
        "--out",
        str(tmp_path / "out"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    common += ["--workers", "1", "--calibration-images", "40", "--test-images", "60", "--scopes", "global"]
    return [*common, "--targets", "0.6", "--seed", "0"]
