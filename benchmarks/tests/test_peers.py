"""Published methods against independent, slow references, and as arms of prune() and of the harness."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from benchmarks.criteria import peers
from benchmarks.criteria.peer_maths import Moments, channel_independence, clusters, merged, ridge_map
from benchmarks.criteria.repairs import REPAIRS, Folding, GramRidge, MeanFold, NormStatistics
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import group_key, prunable_groups
from benchmarks.models.transformers import vit
from ippro_tp import prune


class Given(tp.importance.Importance):
    """Scores by the name of the group's root layer; no others are pruned."""

    def __init__(self, **scores):
        self.scores = scores

    def __call__(self, group, **_):
        return self.scores.get(group_key(group)[0].replace(".", "_"))


def cut(model, x, repair, ratio=0.5, **scores):
    """Prune the groups that have scores, with the repair and without it."""
    made = [
        prune(model, x[:1], [x], ratio=ratio, scope="local", importance=Given(**scores), compensation=how,
              progress=False).model
        for how in (repair, False)
    ]  # fmt: skip
    return [each.eval() for each in made]


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 7, 4)])
def test_channel_independence_is_the_fall_of_the_nuclear_norm(shape):
    maps = torch.randn(shape)
    expected = torch.zeros(shape[1])
    for image in maps:
        whole = torch.linalg.svdvals(image).sum()
        for channel in range(shape[1]):
            left = image.clone()
            left[channel] = 0
            expected[channel] += (whole - torch.linalg.svdvals(left).sum()) / shape[0]
    assert torch.allclose(channel_independence(maps).float(), expected, atol=1e-4)


def test_moments_are_those_of_all_samples_and_positions():
    x = torch.randn(7, 4, 6, dtype=torch.float64) + 3
    for products in (False, True):
        found = Moments(4, products)
        for part in x.split(3):
            found.add(part)
        rows = x.movedim(1, 0).flatten(1)
        assert torch.allclose(found.mean, rows.mean(1))
        assert torch.allclose(found.variance, rows.var(1, correction=0))
    assert torch.allclose(found.gram, rows @ rows.T / rows.shape[1])


def test_the_ridge_map_solves_the_penalised_least_squares():
    rows = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    kept, ridge = torch.tensor([0, 3, 4]), 0.2
    gram = rows.T @ rows / 50
    penalty = (50 * ridge * gram.diagonal()[kept].mean()).sqrt()
    stacked = torch.cat([rows[:, kept], penalty * torch.eye(3, dtype=torch.float64)])
    wanted = torch.cat([rows, torch.zeros(3, 6, dtype=torch.float64)])
    assert torch.allclose(ridge_map(gram, kept, ridge), torch.linalg.lstsq(stacked, wanted).solution.T)


def test_clusters_are_all_there_and_merged_by_hand():
    rows = torch.tensor([[0.0, 0], [9, 9], [0.1, 0], [9, 9.1], [0, 0.1]])
    labels = clusters(rows, 2)
    assert labels[0] == labels[2] == labels[4] != labels[1] == labels[3]
    for average, reduce in ((True, torch.mean), (False, torch.sum)):
        expected = torch.stack([reduce(rows[labels == k], 0) for k in range(2)])
        assert torch.allclose(merged(rows, labels, 2, average), expected)
    assert set(clusters(torch.ones(5, 3), 3).tolist()) == {0, 1, 2}


def test_scores_of_channels_are_those_where_they_are_read(small_task):
    model = copy.deepcopy(small_task.model)
    pruner = build_pruner(model, small_task.example, ("fc",), lambda group: None)
    batches = small_task.calibration(0, 12, 5)
    kept = []
    handle = model.blocks[0].conv2.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    for images, _ in batches:
        model(images)
    handle.remove()
    x = torch.cat(kept)
    group = next(g for g in prunable_groups(pruner) if group_key(g)[0] == "blocks.0.conv1")
    found = peers.variance(model, batches)(group)
    assert torch.allclose(found.float(), x.movedim(1, 0).flatten(1).var(1, correction=0), rtol=1e-4)
    found = peers.chip(model, batches)(group)
    assert torch.allclose(found, channel_independence(x.flatten(2)))


def test_hidden_layers_are_told_from_streams_and_heads(small_task):
    model = vit(dim=24, depth=1, heads=2)
    pruner = build_pruner(model, torch.randn(1, 3, 32, 32), ("head",), lambda group: None)
    groups = {group_key(g)[0]: g for g in prunable_groups(pruner)}
    assert [name for name, g in groups.items() if peers.is_plain(g)] == ["blocks.0.mlp.fc1"]
    assert [name for name, g in groups.items() if peers.is_hidden(g)] == ["blocks.0.mlp.fc1"]
    chosen = peers.OnlyWhere(tp.importance.MagnitudeImportance(), peers.is_plain)
    assert chosen(groups["blocks.0.mlp.fc2"]) is None
    net = copy.deepcopy(small_task.model)
    pruner = build_pruner(net, small_task.example, ("fc",), lambda group: None)
    hidden = {group_key(g)[0] for g in prunable_groups(pruner) if peers.is_hidden(g)}
    assert hidden < {group_key(g)[0] for g in prunable_groups(pruner) if peers.is_plain(g)}
    assert "blocks.0.conv1" in hidden


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_the_mean_of_what_goes_is_still_read():
    model, x = perceptron(), torch.randn(40, 6)
    scores = torch.arange(8.0)  # the first four go
    repaired, _ = cut(model, x, MeanFold(), **{"0": scores})
    hidden = model[:2](x)
    hidden[:, :4] = hidden[:, :4].mean(0)
    assert torch.allclose(repaired(x), model[2](hidden), atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_the_mean_reaches_what_stands_for_a_bias(norm):
    torch.manual_seed(0)
    after = nn.BatchNorm2d(5) if norm else nn.GroupNorm(1, 5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, bias=False), after, nn.Flatten(), nn.Linear(80, 2)
    )
    with torch.no_grad():
        model[0].weight[:3] = 0  # constants: to move them is exact
        if norm:
            after.running_mean.normal_()
    model, x = model.eval(), torch.randn(20, 3, 8, 8)
    repaired, plain = cut(model, x, MeanFold(), **{"0": torch.arange(6.0)})
    assert torch.allclose(repaired(x), model(x), atol=1e-5)
    assert not torch.allclose(plain(x), model(x), atol=1e-2)


def test_what_others_span_is_rebuilt_from_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 2)).eval()
    with torch.no_grad():
        mix = torch.randn(3, 3)
        model[0].weight[:3] = torch.einsum("ij,j...->i...", mix, model[0].weight[3:])
        model[0].bias[:3] = mix @ model[0].bias[3:]
    x = torch.randn(20, 3, 8, 8)
    repaired, plain = cut(model, x, GramRidge(1e-9), **{"0": torch.arange(6.0)})
    assert torch.allclose(repaired(x), model(x), atol=1e-4)
    assert not torch.allclose(plain(x), model(x), atol=1e-2)


def test_folding_twins_changes_nothing():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, 2)).eval()
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[1].bias, model[1].running_mean):
            tensor.normal_()
            tensor[3:] = tensor[:3]
        model[3].weight[:, 3:] = model[3].weight[:, :3]
    repair, x = Folding(), torch.randn(10, 3, 8, 8)
    repair.renorm = False
    for scores in (torch.arange(6.0), torch.tensor([1.0, 3, 5, 0, 2, 4])):  # which go is not asked, but how many
        repaired, plain = cut(model, x, repair, **{"0": scores})
        assert torch.allclose(repaired(x), model(x), atol=1e-4)
        assert not torch.allclose(plain(x), model(x), atol=1e-2)


def test_folding_averages_and_adds_up_as_the_definition_has_it():
    model, x = perceptron(), torch.randn(40, 6)
    repaired, _ = cut(model, x, Folding(), **{"0": torch.arange(8.0)})
    rows = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1)
    labels = clusters(rows.detach(), 4)
    with torch.no_grad():
        hidden = torch.zeros(40, 8)
        for k in range(4):
            members = labels == k
            mean = x @ model[0].weight[members].mean(0) + model[0].bias[members].mean()
            hidden[:, members] = mean.relu()[:, None]
        assert torch.allclose(repaired(x), model[2](hidden), atol=1e-5)


def test_norm_statistics_are_those_of_the_cut_network(small_task):
    images = torch.cat([images for images, _ in small_task.calibration(0, 40, 20)])
    repaired, plain = cut(small_task.model, images, NormStatistics(), conv1=torch.arange(8.0))
    name = next(n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d))
    kept = []
    plain.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    plain(images)
    assert torch.allclose(repaired.get_submodule(name).running_mean, kept[0].mean((0, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("name", REPAIRS)
def test_repairs_keep_the_given_model_and_take_the_harness_pruners(small_task, name):
    before = {key: value.clone() for key, value in small_task.model.state_dict().items()}
    batches = small_task.calibration(0, 30, 10)
    pruner = build_pruner(
        copy.deepcopy(small_task.model), small_task.example, ("fc",), tp.importance.MagnitudeImportance()
    )
    repair = REPAIRS[name]().calibrate(pruner, batches, progress=False)
    repair.step(pruner)
    assert pruner.model(small_task.example).isfinite().all()
    made = prune(small_task.model, small_task.example, batches, macs=0.6, compensation=repair, progress=False)
    assert made.model(small_task.example).isfinite().all()
    assert all(torch.equal(before[key], value) for key, value in small_task.model.state_dict().items())


class Counting(nn.Conv2d):
    """A convolution whose forward pass reshapes to a number that it keeps."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.planes = self.out_channels

    def forward(self, x):
        y = super().forward(x)
        return y.view(len(x), self.planes, -1).view(y.shape)


@pytest.mark.parametrize("repair", [GramRidge(), MeanFold()])
def test_numbers_of_outputs_are_not_taken_for_inputs(repair):
    model = nn.Sequential(
        Counting(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.Flatten(), nn.Linear(80, 2)
    ).eval()
    x = torch.randn(9, 3, 8, 8)
    repaired, _ = cut(model, x, repair, **{"0": torch.arange(12.0)})
    assert repaired[0].weight.shape == (6, 3, 3, 3)
    assert repaired(x).shape == (9, 2)
