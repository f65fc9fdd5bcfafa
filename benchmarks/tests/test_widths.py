from __future__ import annotations

import json
import math

import torch

from benchmarks.__main__ import main
from benchmarks.harness.report import read_cells
from benchmarks.harness.widths import Prediction, minimise


def bowl(point):
    return float((point - torch.tensor([0.5, -0.3, 0.0])).square().sum())


def test_minimise_goes_downhill_and_repeats_itself():
    found = minimise(bowl, 3, tries=200, seed=0)
    assert bowl(found) < 0.02 < bowl(torch.zeros(3))
    assert torch.equal(found, minimise(bowl, 3, tries=200, seed=0))
    assert not torch.equal(found, minimise(bowl, 3, tries=200, seed=1))


def test_minimise_stays_where_nothing_is_better_and_leaves_what_cannot_be_used():
    assert torch.equal(minimise(lambda p: float(p.abs().sum()), 4, 20, 0), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(minimise(lambda p: math.inf, 4, 20, 0), torch.zeros(4, dtype=torch.float64))
    assert bowl(minimise(lambda p: bowl(p) if p.any() else math.inf, 3, 200, 0)) < 0.1


def network():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(6, 4))


def test_distance_is_the_divergence_after_reestimation():
    model = network()
    batches = [(torch.randn(16, 3, 6, 6), torch.zeros(16)) for _ in range(4)]
    prediction = Prediction(model, batches, "cpu")
    scaled = network()
    with torch.no_grad():  # what BatchNorm takes away again, once its statistics are those of the new values
        scaled[0].weight.mul_(3)
        scaled[0].bias.mul_(3)
    same, other = prediction.distance(network()), prediction.distance(scaled)
    assert abs(same - other) < 1e-4
    broken = network()
    with torch.no_grad():
        broken[5].weight.add_(torch.randn_like(broken[5].weight))
    far, compared = prediction.distance(broken), torch.cat([images for images, _ in batches[2:]])
    log_p, log_q = ((net(compared) / 2).log_softmax(1) for net in (model, broken))
    assert math.isclose(far, (log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel_tol=1e-4)
    assert far > 10 * same
    with torch.no_grad():
        broken[5].weight.fill_(math.nan)
    assert prediction.distance(broken) == math.inf


def test_measured_widths_are_an_axis(quick_digits, tmp_path):
    out = tmp_path / "out"
    axes = ["--criteria", "l1", "--cost", "none", "--depletion", "none", "--width-tries", "2"]
    assert main([*quick_digits, *axes, "--widths", "scores", "measured", "--compensate", "none", "fold"]) == 0
    cells = read_cells(out)
    measured = ["l1 + compensation, widths measured", "l1, widths measured"]
    assert sorted(cells.arm) == ["l1", "l1 + compensation", *measured, "unpruned"]
    assert (cells.status == "ok").all()
    assert cells.hit.all()
    plain = json.loads(next(out.glob("cells/*/l1__global__0.6__seed0.json")).read_text())
    searched = json.loads(next(out.glob("cells/*/l1+measured__global__0.6__seed0.json")).read_text())
    folded = json.loads(next(out.glob("cells/*/l1+fold+measured__global__0.6__seed0.json")).read_text())
    assert "width_tries" not in plain["config"]
    assert searched["config"]["width_tries"] == 2
    assert searched["widths"] == folded["widths"]
    assert searched["seconds"]["widths"] > 0
