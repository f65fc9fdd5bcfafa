from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch.nn import functional as F

from benchmarks.criteria import baselines
from benchmarks.criteria.ablation import Ablation
from benchmarks.criteria.registry import find_criterion, known_criteria
from benchmarks.errors import UsageError
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import freeze, group_key, prunable_groups


@pytest.fixture
def setting(small_task):
    model = copy.deepcopy(small_task.model)
    pruner = build_pruner(model, small_task.example, ("fc",), lambda group: None)
    return model, pruner, small_task.calibration(0, 12, 5)


def _group(pruner, name):
    return next(g for g in prunable_groups(pruner) if group_key(g)[0] == name)


def test_signed_fpgm_against_brute_force(setting):
    model, pruner, _ = setting
    group = _group(pruner, "blocks.0.conv1")
    block = model.blocks[0]
    rows = [block.conv1.weight.detach().flatten(1), block.conv2.weight.detach().transpose(0, 1).flatten(1)]
    brute = torch.stack([torch.tensor([sum((a - b).norm().item() for b in m) for a in m]) for m in rows]).mean(0)
    assert torch.allclose(baselines.SignedFPGM()(group), brute / brute.mean(), rtol=1e-4)


def test_signed_fpgm_tells_a_filter_from_its_negative(setting):
    model, pruner, _ = setting
    group = _group(pruner, "blocks.0.conv1")
    with torch.no_grad():
        weight = model.blocks[0].conv1.weight
        weight[1:] = weight[0] + 0.01 * torch.randn_like(weight[1:])
        weight[1] = -weight[0]
        model.blocks[0].conv2.weight.fill_(1.0)
    assert baselines.SignedFPGM()(group).argmax() == 1
    with torch.no_grad():
        weight[1] = -weight[0]
        weight[2:] = weight[0] * torch.tensor([1.0, -1.0] * 3)[:, None, None, None]
    assert tp.importance.FPGMImportance(normalizer=None)(group).abs().max() < 1e-3  # all alike to TP


def test_accumulated_hessian_is_the_mean_of_squared_sample_gradients(setting):
    model, _, batches = setting
    importance = baselines.AccumulatedHessian()
    baselines.per_sample_hessian(importance, model, batches)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for images, labels in batches:
        losses = F.cross_entropy(model(images), labels, reduction="none")
        for loss in losses:
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for name, grad in zip(expected, grads, strict=True):
                expected[name] += grad.square() / 12
    for name, param in model.named_parameters():
        mean = importance._accu_grad[param] / importance._counter[param]
        assert torch.allclose(mean, expected[name], rtol=1e-3, atol=1e-8), name


def test_shipped_hessian_keeps_the_last_sample_only(setting):
    model, _, batches = setting
    importance = tp.importance.HessianImportance()
    baselines.per_sample_hessian(importance, model, batches)
    assert set(importance._counter.values()) == {1}


def test_gate_taylor_is_the_derivative_of_a_gate(setting):
    model, pruner, batches = setting
    baselines.accumulate_gradients(model, batches)
    score = baselines.GateTaylor()(_group(pruner, "blocks.2.conv1"))
    gate = torch.ones(1, 16, 1, 1, requires_grad=True)
    hook = model.blocks[2].bn1.register_forward_hook(lambda m, i, out: out * gate)
    total = sum(F.cross_entropy(model(x), y) for x, y in batches)
    (derivative,) = torch.autograd.grad(total, gate)
    hook.remove()
    assert torch.allclose(score, derivative.flatten().abs(), rtol=1e-3, atol=1e-6)


def test_ablation_is_what_removing_a_channel_changes(setting):
    model, pruner, batches = setting
    importance = Ablation(model, batches)
    images = torch.cat([images for images, _ in batches])
    sizes = []
    for group in list(prunable_groups(pruner)):
        scores = importance(group)
        for channel in (0, len(scores) - 1):
            cut = copy.deepcopy(model)
            name, _ = group_key(group)
            example = images[:1]
            graph = tp.DependencyGraph().build_dependency(cut, example)
            graph.get_pruning_group(cut.get_submodule(name), tp.prune_conv_out_channels, [channel]).prune()
            with torch.no_grad():
                change = cut(images) - model(images)
            expected = (change - change.mean(1, keepdim=True)).norm(dim=1).mean()
            assert torch.isclose(scores[channel], expected, rtol=1e-4, atol=1e-6), (name, channel)
            sizes.append(expected)
    assert max(sizes) > 1e-3


@pytest.mark.parametrize("name", [n for n in known_criteria() if not n.startswith("pro")])
def test_every_arm_gives_finite_scores(setting, name):
    model, pruner, batches = setting
    frozen = freeze(find_criterion(name).build(model, pruner, batches, 0), pruner, name)
    assert all(scores is not None for scores in frozen.scores.values())


def test_families_and_unknown_names():
    assert find_criterion("pro-paper-lam1e-3").build.keywords == {"value": 1e-3}
    for wrong in ("l3", "pro-paper-lam", "pro-paper-lam--1"):
        with pytest.raises(UsageError, match=r"unknown criterion.*known: random, l1"):
            find_criterion(wrong)
