"""The README's Python blocks run, one after another, on a small model."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

README = Path(__file__).parents[1] / "README.md"


def test_the_snippets_run_and_prune():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    example_inputs = torch.randn(1, 3, 32, 32)
    loader = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    before = sum(p.numel() for p in model.parameters())
    namespace = {"model": model, "example_inputs": example_inputs, "loader": loader, "F": F}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        if "pruner" in namespace:
            namespace["pruner"].current_step = 0  # each block speaks of a pruner that has not stepped yet
        exec(block, namespace)
    assert sum(p.numel() for p in model.parameters()) < before
    assert model(example_inputs).isfinite().all()
