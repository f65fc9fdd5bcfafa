"""reference="mean" against finite differences of moving what readers see towards its mean."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import PROImportance
from ippro_tp.groups import groups_of, read_group

from .nets import CASES
from .test_expected import brute_force


def channel_shape(module: nn.Module, x: torch.Tensor) -> list[int]:
    shape = [1] * x.dim()
    shape[1 if isinstance(module, nn.modules.conv._ConvNd) else -1] = -1
    return shape


def means_of(model, readers, x):
    """Mean over samples and positions of each channel that a reader sees."""
    found, handles = {}, []
    for reader in readers:
        module = model.get_submodule(reader.name)

        def note(module, args, name=reader.name):
            axis = channel_shape(module, args[0]).index(-1)
            found[name] = args[0].mean([i for i in range(args[0].dim()) if i != axis])

        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for reader in readers:  # of a flattened map: one mean for all positions of a channel
        for root in reader.root.unique():
            columns = reader.index[reader.root == root]
            found[reader.name][columns] = found[reader.name][columns].mean()
    return found


def brute_force_at_readers(model, group, x, labels, eps=1e-5):
    record = read_group(group)
    means = means_of(model, record.consumers, x)
    scores = torch.zeros(record.width, dtype=x.dtype)
    for channel in range(record.width):
        losses = []
        for sign in (1, -1):
            handles = []
            for reader in record.consumers:
                picked = reader.index[reader.root == channel]

                def move(module, args, picked=picked, name=reader.name, sign=sign):
                    mean, shape = means[name], channel_shape(module, args[0])
                    rate = torch.zeros_like(mean)
                    rate[picked] = sign * eps
                    return (args[0] + rate.view(shape) * (args[0] - mean.view(shape)),)

                handles.append(model.get_submodule(reader.name).register_forward_pre_hook(move))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x), labels, reduction="none"))
            for handle in handles:
                handle.remove()
        scores[channel] = ((losses[0] - losses[1]) / (2 * eps)).square().mean()
    return scores


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scores_equal_finite_differences_towards_the_mean(case):
    model = case.model()
    x, labels = case.inputs()
    imp = PROImportance(reference="mean")
    pruner = case.pruner(model, imp)
    batches = list(zip(x.split(3), labels.split(3), strict=True))
    imp.calibrate(pruner, batches, loss_fn=F.cross_entropy, progress=False)
    centered = 0
    for group in groups_of(pruner):
        key = read_group(group).key
        if f"aa/{key}" in imp._sums:
            centered += 1
            expected = brute_force_at_readers(model, group, x, labels)
        else:
            expected = brute_force(model, group, x, labels, imp._wiring.norm_of, power=2)
        torch.testing.assert_close(imp(group).double(), expected, rtol=1e-3, atol=1e-7)
    assert centered >= 1


def test_attention_is_measured_from_the_origin():
    """What queries and keys do does not pass through the layer that reads the values."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
            self.proj, self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x):
            x = self.proj((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x))
            return self.fc2(F.gelu(self.fc1(x)).mean(1))

    torch.manual_seed(0)
    model = Attention().eval()
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 5, 6), importance=None, ignored_layers=[model.fc2], in_channel_groups={},
        out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    imp = PROImportance(reference="mean").calibrate(pruner, [torch.randn(8, 5, 6)], progress=False)
    centered = {key.removeprefix("aa/") for key in imp._sums if key.startswith("aa/")}
    assert centered == {"proj.out", "fc1.out"}


def test_a_constant_channel_scores_nothing_from_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    scores = {}
    for reference in ("origin", "mean"):
        imp = PROImportance(reference=reference, power=2, cost=None)
        graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 8, 8))
        imp.calibrate(graph, [torch.randn(16, 3, 8, 8)], progress=False)
        scores[reference] = imp(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(6))))
    assert scores["mean"][2] < 1e-6 * scores["mean"].max()
    assert scores["origin"][2] > 1e-3 * scores["origin"].max()


def test_merging_and_saving_keep_the_scores():
    case = CASES["residual"]
    model = case.model()
    x, labels = case.inputs()
    make = lambda: PROImportance(reference="mean")  # noqa: E731
    pruner = case.pruner(model, None)
    whole = make().calibrate(pruner, [(x, labels)], loss_fn=F.cross_entropy, progress=False)
    first = make().calibrate(pruner, [(x[:3], labels[:3])], loss_fn=F.cross_entropy, progress=False)
    first.merge(make().calibrate(pruner, [(x[3:], labels[3:])], loss_fn=F.cross_entropy, progress=False))
    loaded = make()
    loaded.load_state_dict(copy.deepcopy(first.state_dict()))
    for group in groups_of(pruner):
        torch.testing.assert_close(first(group), whole(group), rtol=1e-5, atol=1e-9)
        assert torch.equal(loaded(group), first(group))


def test_other_options_are_refused():
    for options in ({"power": 1}, {"estimator": "paper"}, {"group_reduction": "mean"}):
        with pytest.raises(ValueError, match="reference"):
            PROImportance(reference="mean", **options)
