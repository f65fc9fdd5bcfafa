"""What CONTRIBUTING shows how to add is short, and works where it is added."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.criteria import registry
from benchmarks.harness.finetune import Recipe
from benchmarks.tasks import digits
from ippro_tp import PROImportance, layers, prune, register_estimator
from ippro_tp.estimators import base

from .test_docs import blocks


@pytest.fixture(autouse=True)
def _registers(monkeypatch):
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))
    monkeypatch.setattr(layers, "_ACTIVATIONS", set(layers._ACTIVATIONS) - {"erf"})
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def added(word: str, lines: int) -> None:
    (code,) = [code for name, code in blocks() if name.startswith("CONTRIBUTING") and word in code]
    assert len([line for line in code.splitlines() if line.strip()]) < lines
    exec(compile(code, "<CONTRIBUTING>", "exec"), {"__name__": "__main__"})


def test_a_criterion_in_the_harness(tmp_path, monkeypatch):
    added("@criterion", 20)
    built = digits.build
    monkeypatch.setattr(digits, "build", lambda config: built(config, Recipe(epochs=1, learning_rate=0.03)))
    flags = ["--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    flags += ["--calibration-images", "40", "--test-images", "60", "--scopes", "global", "--targets", "0.6"]
    flags += ["--cost", "none", "--depletion", "none", "--seed", "0"]
    assert main(["compare", "--task", "digits", "--criteria", "spread", *flags]) == 0
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")]
    assert any("spread" in str(cell) for cell in cells)


def test_an_estimator_in_one_file():
    added("@register_estimator", 30)
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    data = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    importance = PROImportance("accumulated")
    result = prune(model, images[:1], data, ratio=0.5, importance=importance, compensation=False, progress=False,
                   loss_fn=nn.functional.cross_entropy)  # fmt: skip
    nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    offsets = (first.weight * first.weight.grad).flatten(1).sum(1) + first.bias * first.bias.grad
    kept = offsets.abs().topk(4).indices.sort().values
    assert torch.equal(result.model[0].weight, first.weight[kept])
    with pytest.raises(ValueError, match=r"power=2 is an option of .*expected.*, not of .*accumulated"):
        PROImportance("accumulated", power=2)
    with pytest.raises(ValueError, match="choose one of 'expected', 'paper', 'accumulated'"):
        PROImportance("accumulate")
    with pytest.raises(ValueError, match="the package's own"):
        register_estimator("paper")


def test_an_activation():
    assert not layers.is_activation("erf")
    added("register_activation", 5)
    assert layers.is_activation("erf")
