"""The robustness lines run, and the checks find what they are there to find."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.robustness import checks, run
from benchmarks.robustness.judge import OK, WRONG
from benchmarks.robustness.line import Line
from benchmarks.robustness.reference import silenced_outputs
from ippro_tp import PROImportance

LINES = ("frames", "sorted", "unet-transposed", "conv3d", "channels", "dict-inputs", "frozen", "generator")


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_right(name):
    cells = run.checked(run.LINES[name])
    assert not [text for text in cells.values() if text.startswith(WRONG)], cells
    assert cells["scores"].startswith(OK)


def test_wrong_scores_are_found(monkeypatch):
    honest = PROImportance.__call__

    def shuffled(self, group, **more):
        scores = honest(self, group, **more)
        return scores if scores is None else scores.roll(1)

    monkeypatch.setattr(PROImportance, "__call__", shuffled)
    line = dataclasses.replace(run.LINES["frames"], samples=8)
    found = {column: cell.verdict for column, cell in checks.Checks(line).run()}
    assert found["scores"] == WRONG
    assert found["dead"] == WRONG


def test_a_net_that_is_not_the_silenced_original_is_found():
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    line = Line("small", "", build, lambda n, g: torch.randn(n, 4, generator=g))
    original, pruned, x = line.model(), line.model(), line.inputs(5)
    keep = torch.tensor([0, 2, 3, 5, 7])
    with torch.no_grad():
        pruned[0].weight, pruned[0].bias = (nn.Parameter(p[keep]) for p in (pruned[0].weight, pruned[0].bias))
        pruned[1] = nn.LayerNorm(5)
        pruned[1].weight.copy_(original[1].weight[keep])
        pruned[1].bias.copy_(original[1].bias[keep])
        pruned[3].weight = nn.Parameter(pruned[3].weight[:, keep])
    torch.testing.assert_close(silenced_outputs(original, pruned, x), pruned(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        pruned[3].weight.copy_(original[3].weight[:, keep.flip(0)])
    assert not torch.allclose(silenced_outputs(original, pruned, x), pruned(x), rtol=1e-2)
    with torch.no_grad():
        pruned[3].weight[0, 0] += 1
    with pytest.raises(ValueError, match="3 holds numbers that are not the original's"):
        silenced_outputs(original, pruned, x)


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm with an activation of its own."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Standardised(nn.Conv2d):
    """Standardises its weight over the channels that it has."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return nn.functional.conv2d(x, weight, self.bias)


@torch.no_grad()
def test_the_reference_knows_groups_norms_with_activations_and_standardised_weights():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), NormAct(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1, groups=2), Standardised(4, 6, 1)
    original = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).eval()
    for parameter in original.parameters():
        parameter.normal_()
    pruned = copy.deepcopy(original)
    keep = torch.tensor([0, 2, 3, 5, 6, 7])  # other places in each group
    for layer in (pruned[0], pruned[1]):
        layer.weight, layer.bias = nn.Parameter(layer.weight[keep]), nn.Parameter(layer.bias[keep])
    pruned[1].running_mean, pruned[1].running_var = torch.zeros(6), torch.ones(6)
    grouped = original[3].weight
    pruned[3].weight = nn.Parameter(torch.cat([grouped[:2][:, [0, 2, 3]], grouped[2:][:, [1, 2, 3]]]))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="3 holds other numbers"):
        silenced_outputs(original, pruned, x)
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    for layer, whole in ((pruned[0], original[0]), (pruned[1], original[1])):
        layer.weight, layer.bias = nn.Parameter(whole.weight[keep]), nn.Parameter(whole.bias[keep])
    pruned[3].weight = nn.Parameter(grouped[:, :3])
    some = torch.tensor([0, 2])
    pruned[4].weight, pruned[4].bias = nn.Parameter(original[4].weight[some]), nn.Parameter(original[4].bias[some])
    pruned[5].weight = nn.Parameter(original[5].weight[:, some])
    torch.testing.assert_close(silenced_outputs(original, pruned, x), pruned(x), rtol=1e-4, atol=1e-5)
    narrower = copy.deepcopy(pruned)
    narrower[3].weight = nn.Parameter(grouped[[0, 2]][:, :3])
    narrower[3].bias = nn.Parameter(original[3].bias[[0, 2]])
    narrower[4].weight = nn.Parameter(pruned[4].weight[:, [0, 2]])
    torch.testing.assert_close(silenced_outputs(original, narrower, x), narrower(x), rtol=1e-4, atol=1e-5)


def test_the_command_prints_what_is_asked_for(capsys):
    run.run(run.RobustnessConfig(only=("conv1d",)))
    assert capsys.readouterr().out.startswith("conv1d: scores ok; dead ok")


def test_an_unknown_line_is_named():
    with pytest.raises(run.UsageError, match="no line 'nonsense'"):
        run.run(run.RobustnessConfig(only=("nonsense",)))


def test_the_page_says_what_is_behind_a_verdict():
    found = {name: {**dict.fromkeys(checks.COLUMNS, OK), "s": "1.0"} for name in run.LINES}
    found["frames"]["dead"] = f"{WRONG}: scores 1, median 0"
    text = run.page(found)
    assert "| frames |" in text
    assert "* **frames**, dead: WRONG: scores 1, median 0" in text
