"""reference="mean" against finite differences of moving what readers see towards its mean."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import PROImportance
from ippro_tp.estimators.centered import MADE_UP
from ippro_tp.graph.groups import groups_of, read_group

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


def slopes_at_readers(model, group, x, labels, share, eps=1e-5):
    """``(samples, width)``: slope of the loss as what readers see moves away from ``share`` times its mean."""
    record = read_group(group)
    means = means_of(model, record.consumers, x)
    slopes = []
    for channel in range(record.width):
        losses = []
        for sign in (1, -1):
            handles = []
            for reader in record.consumers:
                picked = reader.index[reader.root == channel]

                def move(module, args, picked=picked, name=reader.name, sign=sign):
                    point, shape = share(name) * means[name], channel_shape(module, args[0])
                    rate = torch.zeros_like(point)
                    rate[picked] = sign * eps
                    return (args[0] + rate.view(shape) * (args[0] - point.view(shape)),)

                handles.append(model.get_submodule(reader.name).register_forward_pre_hook(move))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x), labels, reduction="none"))
            for handle in handles:
                handle.remove()
        slopes.append((losses[0] - losses[1]) / (2 * eps))
    return torch.stack(slopes, 1)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("reference", ["auto", "mean"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scores_equal_finite_differences_towards_the_mean(case, reference, power):
    model = case.model()
    x, labels = case.inputs()
    imp = PROImportance(reference=reference, power=power)
    pruner = case.pruner(model, imp)
    batches = list(zip(x.split(4), labels.split(4), strict=True))
    imp.calibrate(pruner, batches, loss_fn=F.cross_entropy, progress=False)

    def share(reader):
        norm = imp._observed.wiring.norm_of.get(reader)
        followed = norm is not None and isinstance(model.get_submodule(norm), nn.BatchNorm2d)
        return 1.0 if reference == "mean" else MADE_UP * followed

    found = 0
    for group in groups_of(pruner):
        record = read_group(group)
        if record.key not in imp._observed.wiring.centered:
            expected = brute_force(model, group, x, labels, imp._observed.wiring.norm_of, power)
            torch.testing.assert_close(imp(group).double(), expected, rtol=1e-3, atol=1e-7)
            continue
        found += 1
        assert any(share(reader.name) > 0 for reader in record.consumers)
        a = slopes_at_readers(model, group, x, labels, lambda reader: 0.0)
        t = slopes_at_readers(model, group, x, labels, share)
        expected = t.square().mean(0)
        if power == 1:
            expected = a.abs().mean(0) * (expected / a.square().mean(0).clamp_min(1e-30)).sqrt()
        torch.testing.assert_close(imp(group).double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())
        correlation = imp.coupling(group).correlation[0].double()
        together = t if len(record.consumers) == 1 else a
        size = together.square().sum(0).sqrt().clamp_min(1e-15)  # of a dead channel: zero
        known = size > 1e-5 * a.square().sum(0).sqrt()  # what a channel that is constant goes with is rounding
        expected = together.T @ together / size / size[:, None]
        assert bool((correlation.abs() <= 1 + 1e-6).all())
        assert known.sum() > 1
        torch.testing.assert_close(correlation[known][:, known], expected[known][:, known], rtol=1e-3, atol=1e-4)
    with_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (found > 0) == (with_norms or reference == "mean")


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
    assert imp._observed.wiring.centered == {"proj.out", "fc1.out"}


@pytest.mark.parametrize(
    ("norm", "forgets"),
    [(nn.BatchNorm2d, True), (nn.InstanceNorm2d, False), (lambda n: nn.GroupNorm(2, n), False)],
)
def test_a_mean_is_made_up_for_where_a_batchnorm_follows_the_reader(norm, forgets):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    model = nn.Sequential(*layers).eval()
    scores = {}
    for reference in ("auto", "origin"):
        imp = PROImportance(reference=reference)
        graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 8, 8))
        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        imp.calibrate(graph, images.split(8), progress=False)
        told = [row.root for row in imp.report() if "measured at its readers" in row.notes]
        assert told == (["0.out"] if forgets and reference == "auto" else [])
        scores[reference] = [
            imp(graph.get_pruning_group(model[i], tp.prune_conv_out_channels, list(range(n))))
            for i, n in ((0, 6), (2, 4))
        ]
    assert torch.equal(*(scores[reference][1] for reference in scores))  # read by the Linear layer
    assert torch.equal(*(scores[reference][0] for reference in scores)) == (not forgets)


def test_a_reader_that_no_gradient_reaches_adds_nothing():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.read, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
            self.side, self.side_norm, self.fc = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.conv(x).relu()
            side = self.side_norm(self.side(x))
            x = self.norm(self.read(x)) + side.detach() + (0 if self.cut else 0 * side)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model, images, scores = Cut().eval(), torch.randn(8, 3, 8, 8), []
    for model.cut in (True, False):
        graph = tp.DependencyGraph().build_dependency(model, images[:1])
        imp = PROImportance().calibrate(graph, images.split(4), progress=False)
        group = graph.get_pruning_group(model.conv, tp.prune_conv_out_channels, list(range(6)))
        assert imp._observed.wiring.centered == {"conv.out"}
        scores.append(imp(group))
    torch.testing.assert_close(*scores)
    assert scores[0].min() > 0


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
    for options in ({"estimator": "paper"}, {"group_reduction": "mean"}):
        with pytest.raises(ValueError, match="reference"):
            PROImportance(reference="mean", **options)
