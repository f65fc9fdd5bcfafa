"""The "expected" estimator against finite differences and against per-sample autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ippro_tp import PROImportance
from ippro_tp.graph.groups import groups_of, read_group

from .nets import CASES


def brute_force(model, group, x, labels, norm_of, power=1, eps=1e-5):
    """E_n |d loss_n / d s| with all producers of one channel scaled by 1 + s, by central differences."""
    record = read_group(group)
    tapped = [layer for layer in record.producers if layer.name not in norm_of]
    scores = torch.zeros(record.width, dtype=x.dtype)
    for channel in range(record.width):
        losses = []
        for sign in (1, -1):
            handles = []
            for layer in tapped:
                picked = layer.index[layer.root == channel]
                module = model.get_submodule(layer.name)
                axis = -1 if isinstance(module, nn.Linear) else 1

                def scale(module, args, output, picked=picked, axis=axis, sign=sign):
                    factor = torch.ones(output.shape[axis], dtype=output.dtype)
                    factor[picked] += sign * eps
                    shape = [1] * output.dim()
                    shape[axis] = -1
                    return output * factor.view(shape)

                handles.append(module.register_forward_hook(scale))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x), labels, reduction="none"))
            for handle in handles:
                handle.remove()
        t = (losses[0] - losses[1]) / (2 * eps)
        scores[channel] = t.abs().pow(power).mean()
    return scores


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("power", [1, 2])
def test_scores_equal_finite_differences_of_joint_scaling(case, power):
    model = case.model()
    x, labels = case.inputs()
    imp = PROImportance(power=power, reference="origin")
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [(x, labels)], loss_fn=F.cross_entropy, progress=False)
    groups = list(groups_of(pruner))
    assert groups
    for group in groups:
        expected = brute_force(model, group, x, labels, imp._observed.wiring.norm_of, power)
        assert expected.max() > 0
        torch.testing.assert_close(imp(group).double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "prod", "first"])
def test_reductions_combine_the_layers_own_scores(reduction):
    case = CASES["residual"]
    model = case.model()
    x, labels = case.inputs()
    imp = PROImportance(group_reduction=reduction)
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, [(x, labels)], loss_fn=F.cross_entropy, progress=False)
    stream = next(g for g in groups_of(pruner) if len(read_group(g).producers) > 2)
    names = [p.name for p in read_group(stream).producers if p.name.split(".")[-1].startswith("bn")]
    assert len(names) == 3

    own = []
    for name in names:  # per-sample gradients of one layer's output, by autograd
        sums = []

        def read(module, args, y, sums=sums):
            value = y.detach().clone()  # the ReLU after it works in place
            y.register_hook(lambda g: sums.append((g * value).sum((2, 3))))

        handle = model.get_submodule(name).register_forward_hook(read)
        F.cross_entropy(model(x), labels, reduction="sum").backward()
        handle.remove()
        own.append(sums[0].abs().mean(0))
    stacked = torch.stack(own)
    expected = {
        "mean": stacked.mean(0),
        "sum": stacked.sum(0),
        "max": stacked.amax(0),
        "prod": stacked.prod(0),
        "first": stacked[0],
    }[reduction]
    torch.testing.assert_close(imp(stream), expected.float(), rtol=1e-4, atol=1e-7)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(sorted(CASES)))
@settings(max_examples=15, deadline=None)
def test_scores_do_not_depend_on_how_the_samples_are_cut_into_batches(sizes, name):
    case = CASES[name]
    model = case.model()
    x, labels = case.inputs(sum(sizes))

    def scores(batches):
        imp = PROImportance()
        pruner = case.pruner(model, imp)
        imp.calibrate(pruner, batches, progress=False)  # labels drawn by the package: the same for every cut
        return torch.cat([imp(group) for group in groups_of(pruner)])

    together = scores([(x, labels)])
    cut = scores(list(zip(x.split(sizes), labels.split(sizes), strict=True)))
    torch.testing.assert_close(cut, together, rtol=1e-5, atol=1e-7)


def test_sum_reduced_losses_are_told_apart_from_mean_reduced_ones():
    case = CASES["concat"]
    model = case.model()
    x, labels = case.inputs(7)
    scores = []
    for reduction in ("mean", "sum"):
        imp = PROImportance()
        pruner = case.pruner(model, imp)
        with imp.observe(pruner, loss_reduction=reduction):
            for part, target in zip(x.split(3), labels.split(3), strict=True):
                F.cross_entropy(model(part), target, reduction=reduction).backward()
        scores.append(torch.cat([imp(group) for group in groups_of(pruner)]))
    torch.testing.assert_close(scores[0], scores[1])


def test_scores_do_not_change_under_function_preserving_rescaling():
    case = CASES["transposed"]
    model = case.model()
    rescaled = copy.deepcopy(model)
    factor = torch.logspace(-2, 2, 8, dtype=torch.float64)
    with torch.no_grad():  # leaky_relu is homogeneous: scale what up gives, unscale what grouped takes
        rescaled.up.weight *= factor.view(1, -1, 1, 1)
        rescaled.up.bias *= factor
        rescaled.grouped.weight /= factor.view(2, 1, 4, 1, 1).expand(2, 4, 4, 1, 1).reshape(8, 4, 1, 1)
    x, labels = case.inputs()
    torch.testing.assert_close(model(x), rescaled(x))
    results = []
    for net in (model, rescaled):
        imp = PROImportance()
        pruner = case.pruner(net, imp)
        imp.calibrate(pruner, [(x, labels)], loss_fn=F.cross_entropy, progress=False)
        results.append(torch.cat([imp(group) for group in groups_of(pruner)]))
    torch.testing.assert_close(results[0], results[1])


def test_a_producer_used_twice_counts_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.stem(x))
            x = F.relu(self.shared(x)) + F.relu(self.shared(x * 0.5))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().double().eval()
    x, labels = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    imp = PROImportance(group_reduction="first")
    with imp.observe(model):
        F.cross_entropy(model(x), labels).backward()
    outputs = []
    handle = model.shared.register_forward_hook(lambda m, a, y: outputs.append(y))
    grads = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), outputs)
    handle.remove()
    expected = sum((g * y).sum((2, 3)) for g, y in zip(grads, outputs, strict=True)).abs().mean(0)
    record = next(r for r in imp._records.values() if "shared" in {p.name for p in r.producers})
    torch.testing.assert_close(imp._sums[f"{record.key}/shared"] / 5, expected.detach())
