"""Compensation: exact where channels are exact combinations, least squares elsewhere, never worse than nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ippro_tp import Compensation, NotCalibratedError, ObservationError
from ippro_tp.compensation.cutlayer import CutLayer
from ippro_tp.compensation.moments import gram
from ippro_tp.compensation.patches import Rows, choose, inputs_at, outputs_at, rows_of
from ippro_tp.compensation.regression import refit
from ippro_tp.compensation.samples import Samples, even_choice


def removing(model: nn.Module, example: Tensor, removals: dict[str, list[int]], **options):
    """A real pruner that ranks the channels of ``removals`` last and removes just them."""
    modules = dict(model.named_modules())

    def score(group):
        dep, idxs = group[0]
        name = next(n for n, m in modules.items() if m is dep.target.module)
        gone = removals.get(name)
        if gone is None:
            return None
        return torch.tensor([0.0 if i in gone else 1.0 + i for i in idxs])

    ratios = {modules[n]: len(gone) / _outputs(modules[n]) for n, gone in removals.items()}
    defaults = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    settings = {"pruning_ratio": 0.0, "pruning_ratio_dict": ratios, **defaults, **options}
    return tp.pruner.BasePruner(model, (example,), importance=score, **settings)


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def combine(layer: nn.Module, removed: list[int], seed: int = 0) -> None:
    """Make the outputs ``removed`` of a layer exact linear combinations of its other outputs."""
    generator = torch.Generator().manual_seed(seed)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    with torch.no_grad():
        weight = layer.weight.transpose(0, 1) if transposed else layer.weight
        kept = [i for i in range(weight.shape[0]) if i not in removed]
        mix = torch.rand(len(removed), len(kept), generator=generator).to(weight) - 0.3
        weight[removed] = torch.einsum("rk,k...->r...", mix, weight[kept])
        if layer.bias is not None:
            layer.bias[removed] = mix @ layer.bias[kept]


def fitted(x: Tensor) -> Tensor:
    """The samples that layers are fitted to; the others judge the whole."""
    held = even_choice(len(x), len(x) // 10)
    return x[[i for i in range(len(x)) if i not in held]]


def batches(shape: tuple[int, ...], samples: int = 32, size: int = 8, dtype=torch.float32, seed: int = 1):
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return list(x.split(size))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool2d(self.a(x), 3).flatten(1))


class Concat(nn.Module):
    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.c = nn.Conv2d(14, 5, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


class Residual(nn.Module):
    """A stream with two writers and three readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.side, self.head = nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(F.relu(self.inner(x)))
        return torch.cat([self.head(x).flatten(1), self.side(x).flatten(1)], 1)


class Attention(nn.Module):
    """One head, v alone decides what is pruned; then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.proj, self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.fc2(F.gelu(self.fc1(self.proj(weights @ self.v(x)))))


def _sequential(first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, *rest)


CASES = {
    "conv": (lambda: _sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)), (3, 10, 10), {"0": [1, 4, 6]}),
    "stride and padding": (
        lambda: _sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, stride=2, padding=1)),
        (3, 10, 10),
        {"0": [1, 4, 6]},
    ),
    "dilation, reflected": (
        lambda: _sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, dilation=2, padding=2, padding_mode="reflect", bias=False)
        ),
        (3, 10, 10),
        {"0": [0, 7]},
    ),
    "strided 1x1": (
        lambda: _sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1, stride=2), nn.ReLU()),
        (3, 10, 10),
        {"0": [2, 3]},
    ),
    "batch norm": (
        lambda: _sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)
        ),
        (3, 10, 10),
        {"0": [0, 5]},
    ),
    "conv1d": (lambda: _sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 3, padding=1)), (3, 12), {"0": [1, 2]}),
    "transposed": (
        lambda: _sequential(
            nn.ConvTranspose2d(3, 8, 3), nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1)
        ),
        (3, 6, 6),
        {"0": [1, 7]},
    ),
    "linear": (lambda: _sequential(nn.Linear(6, 10), nn.Linear(10, 4)), (6,), {"0": [0, 3, 9]}),
    "tokens": (lambda: _sequential(nn.Linear(6, 10), nn.Linear(10, 4)), (7, 6), {"0": [0, 3, 9]}),
    "flatten": (Flatten, (3, 8, 8), {"a": [2, 3]}),
    "concat": (Concat, (3, 8, 8), {"a": [2, 3], "b": [0]}),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_combinations_cost_nothing(case: str) -> None:
    make, shape, removals = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    for name, removed in removals.items():
        combine(model.get_submodule(name), removed)
    reference, x = copy.deepcopy(model), torch.randn(16, *shape)
    pruner = removing(model, x[:1], removals)
    report = Compensation().calibrate(pruner, batches(shape, 128), progress=False).step(pruner)
    assert report.rows
    assert not any(row.skipped for row in report.rows), str(report)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in reference.parameters())
    expected, got = reference(x), model(x)
    assert (got - expected).norm() <= 1e-5 * expected.norm(), str(report)


def test_grouped_convolution_is_solved_within_its_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, padding=1, groups=2)).eval()
    removed = [1, 4, 7, 10]
    with torch.no_grad():  # each removed channel is made of channels of its own group
        for group in ([0, 2, 3, 5], [6, 8, 9, 11]):
            gone = [c for c in removed if c // 6 == group[0] // 6]
            mix = torch.rand(2, 4) - 0.3
            model[0].weight[gone] = torch.einsum("rk,k...->r...", mix, model[0].weight[group])
            model[0].bias[gone] = mix @ model[0].bias[group]
    reference, x = copy.deepcopy(model), torch.randn(8, 3, 9, 9)
    scores = torch.ones(12)
    scores[removed] = 0
    pruner = tp.pruner.BasePruner(
        model, (x[:1],), importance=lambda group: scores[group[0].idxs], pruning_ratio=1 / 3,
        ignored_layers=[model[1]], in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    report = Compensation().calibrate(pruner, batches((3, 9, 9)), progress=False).step(pruner)
    assert model[1].weight.shape == (8, 4, 3, 3)
    assert (model(x) - reference(x)).norm() <= 1e-5 * reference(x).norm(), str(report)


def test_residual_stream_is_solved_at_each_reader() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    removed, kept = [1, 6], [0, 2, 3, 4, 5, 7]
    mix = torch.rand(2, 6) - 0.3
    with torch.no_grad():
        for layer in (model.stem, model.back):
            layer.weight[removed] = torch.einsum("rk,k...->r...", mix, layer.weight[kept])
            layer.bias[removed] = mix @ layer.bias[kept]
    reference, x = copy.deepcopy(model), torch.randn(8, 3, 8, 8)
    pruner = removing(model, x[:1], {"stem": removed, "back": removed}, ignored_layers=[model.head, model.side])
    report = Compensation().calibrate(pruner, batches((3, 8, 8), 64), progress=False).step(pruner)
    assert {row.name for row in report.rows} == {"inner", "side", "head"}
    assert (model(x) - reference(x)).norm() <= 1e-5 * reference(x).norm(), str(report)


def test_attention_values_and_mlp() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    combine(model.v, [2, 5])
    with torch.no_grad():  # a GELU of equal rows: hidden channels 3 and 8 repeat 0 and 1, q and k use 6 of 8
        for layer in (model.q, model.k):
            layer.weight[[2, 5]] = 0
            layer.bias[[2, 5]] = 0
        model.fc1.weight[[3, 8]] = model.fc1.weight[[0, 1]]
        model.fc1.bias[[3, 8]] = model.fc1.bias[[0, 1]]
    reference, x = copy.deepcopy(model), torch.randn(8, 5, 6)
    removals = {"q": [2, 5], "k": [2, 5], "v": [2, 5], "fc1": [3, 8]}
    pruner = removing(model, x[:1], removals, ignored_layers=[model.fc2])
    report = Compensation().calibrate(pruner, batches((5, 6), 64), progress=False).step(pruner)
    assert {"proj", "fc2"} <= {row.name for row in report.rows}
    assert (model(x) - reference(x)).norm() <= 1e-5 * reference(x).norm(), str(report)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_equal_least_squares_on_stored_activations(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3, bias=False), nn.ReLU(), nn.Conv2d(10, 6, 1, bias=bias))
    model = model.double().eval()
    original, loader, removed = copy.deepcopy(model), batches((3, 8, 8), 24, 8, torch.float64), [0, 3, 7]
    pruner = removing(model, loader[0][:1], {"0": removed})
    Compensation(ridge=0.0).calibrate(pruner, loader, progress=False).step(pruner)

    stored = original[:2](fitted(torch.cat(loader))).transpose(0, 1).flatten(1).T  # (rows, channels)
    kept = [c for c in range(10) if c not in removed]
    features = torch.cat([stored[:, kept], stored.new_ones(len(stored), 1)], 1) if bias else stored[:, kept]
    solution = torch.linalg.lstsq(features, stored[:, removed]).solution[: len(kept)]
    weight = original[2].weight
    expected = weight[:, kept] + torch.einsum("orhw,kr->okhw", weight[:, removed], solution)
    torch.testing.assert_close(model[2].weight, expected, rtol=1e-6, atol=1e-6)
    if bias:  # the mean output is what it was
        before, after = (net(fitted(torch.cat(loader))).mean((0, 2, 3)) for net in (original, model))
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_give_the_least_squares_solution_for_the_output(bias: bool, stride: int) -> None:
    torch.manual_seed(0)
    consumer = nn.Conv2d(6, 5, 3, padding=1, stride=stride, bias=bias)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), consumer).double().eval()
    original, loader, removed = copy.deepcopy(model), batches((3, 9, 8), 24, 8, torch.float64), [0, 3]
    pruner = removing(model, loader[0][:1], {"0": removed})
    report = Compensation(ridge=0.0).calibrate(pruner, loader, progress=False).step(pruner)
    assert [row.name for row in report.rows] == ["2"]
    with torch.no_grad():
        hidden = original[:2](fitted(torch.cat(loader)))
        outputs = original[2](hidden).transpose(0, 1).flatten(1).T
        rows = F.unfold(hidden[:, [1, 2, 4, 5]], 3, padding=1, stride=stride).transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if bias else rows
        solution = torch.linalg.lstsq(rows, outputs).solution.T
    torch.testing.assert_close(model[2].weight.flatten(1), solution[:, :36], rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(model[2].bias, solution[:, 36], rtol=1e-6, atol=1e-6)


def test_concat_is_solved_jointly() -> None:
    torch.manual_seed(0)
    model = Concat(padding=0).double().eval()
    loader = batches((3, 8, 8), 24, 8, torch.float64)
    original = copy.deepcopy(model)
    pruner = removing(model, loader[0][:1], {"a": [1, 2], "b": [0, 4]})
    Compensation(ridge=0.0).calibrate(pruner, loader, progress=False).step(pruner)
    with torch.no_grad():
        x = fitted(torch.cat(loader))
        hidden = torch.cat([original.a(x), original.b(x)], 1)
        outputs = original.c(hidden).transpose(0, 1).flatten(1).T
        kept = [c for c in range(14) if c not in (1, 2, 8, 12)]
        rows = F.unfold(hidden[:, kept], 3).transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        # Patches of two linear branches are linearly dependent: weights are not unique, what they give is.
        expected = rows @ torch.linalg.lstsq(rows, outputs, driver="gelsd").solution
        got = model.c(hidden[:, kept]).transpose(0, 1).flatten(1).T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def pruner_of(model: nn.Module, ratio: float = 0.5):
    return tp.pruner.BasePruner(
        model, (torch.randn(1, 3, 9, 9),), importance=tp.importance.MagnitudeImportance(), pruning_ratio=ratio,
        ignored_layers=[model[-1]], in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
        iterative_steps=1,
    )  # fmt: skip


def test_nothing_changes_where_nothing_is_removed() -> None:
    model = small_net()
    pruner = pruner_of(model, 0.0)
    comp = Compensation().calibrate(pruner, batches((3, 9, 9)), progress=False)
    before = copy.deepcopy(model.state_dict())
    assert comp.step(pruner).rows == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_observing_leaves_the_model_as_it_was() -> None:
    model = small_net().train()
    pruner = pruner_of(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    with Compensation().observe(pruner):
        for x in batches((3, 9, 9)):
            model(x)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def output_error(ratio: float, images: int, compensate: bool, seed: int) -> float:
    model = small_net()
    reference, x = copy.deepcopy(model), torch.randn(256, 3, 9, 9, generator=torch.Generator().manual_seed(99))
    pruner = pruner_of(model, ratio)
    if compensate:
        Compensation().calibrate(pruner, batches((3, 9, 9), images, 2, seed=seed), progress=False).step(pruner)
    else:
        pruner.step()
    return float((model(x) - reference(x)).norm())


@pytest.mark.parametrize("images", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_few_images_do_no_harm(images: int, seed: int) -> None:
    """Each layer's held-out output is nearer to the original's than without compensation, or the same."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1)).eval()
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    removals, x = {"0": [0, 2, 3, 5, 8, 11, 13]}, torch.randn(256, 3, 9, 9)
    removing(plain, x[:1], removals).step()
    pruner = removing(model, x[:1], removals)
    Compensation().calibrate(pruner, batches((3, 9, 9), images, 2, seed=seed), progress=False).step(pruner)
    errors = [float((net(x) - reference(x)).norm().detach()) for net in (model, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_more_images_help() -> None:
    assert output_error(0.5, 256, True, 0) < 0.7 * output_error(0.5, 256, False, 0)


def test_merge_equals_one_calibration_and_state_dict_round_trips() -> None:
    model = small_net()
    pruner, loader = pruner_of(model), batches((3, 9, 9), 32, 8)
    whole = Compensation().calibrate(pruner, loader, progress=False)
    merged = Compensation().calibrate(pruner, loader[:2], progress=False)
    merged.merge(Compensation().calibrate(pruner, loader[2:], progress=False))
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    file.seek(0)
    loaded = Compensation()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    models = []
    for comp in (whole, merged, loaded):
        pruned = copy.deepcopy(model)
        comp.step(pruner_of(pruned))
        models.append(pruned.state_dict())
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value)
        assert torch.equal(models[1][key], models[2][key])


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=6), limit=st.integers(2, 40))
def test_kept_samples_do_not_depend_on_batches_and_cover_all(cuts: list[int], limit: int) -> None:
    x = torch.arange(30.0).view(30, 1)
    samples = Samples(limit)
    for part in torch.tensor_split(x, sorted(cuts)):
        if len(part):
            samples.add((part, 7), {"mask": part > 3})
    samples.settle()
    (kept, seven), kwargs = samples.arguments()
    wanted = min(30, limit)
    assert samples.count == len(kept) == wanted
    ideal = (torch.arange(wanted) + 0.5) * 30 / wanted
    assert bool(((kept.flatten() - ideal).abs() <= 30 / wanted + 1).all())
    assert len(kept.unique()) == wanted
    assert seven == 7
    assert torch.equal(kwargs["mask"], kept > 3)


@pytest.mark.parametrize(("first", "second"), [(30, 30), (100, 20), (20, 100)])
def test_merged_samples_are_in_proportion(first: int, second: int) -> None:
    parts = [Samples(12), Samples(12)]
    for samples, count, sign in zip(parts, (first, second), (1, -1), strict=True):
        samples.add((sign * torch.arange(1.0, count + 1).view(count, 1),), {})
    parts[0].merge(parts[1])
    (kept,), _ = parts[0].arguments()
    assert parts[0].count == len(kept) == 12
    assert int((kept > 0).sum()) == round(12 * first / (first + second))


def test_lists_of_images_are_samples_whatever_their_number() -> None:
    samples, images = Samples(4), [torch.full((3, 4 + i, 5), float(i)) for i in range(3)]
    samples.add((images,), {})
    samples.add((images[:2],), {})
    (kept,), _ = samples.arguments(torch.tensor([0, 2, 4]))
    assert [x.shape for x in kept] == [(3, 4, 5), (3, 6, 5), (3, 5, 5)]


def test_inputs_that_cannot_be_joined_are_refused() -> None:
    samples = Samples(8)
    samples.add((torch.zeros(2, 3, 8, 8),), {})
    with pytest.raises(ObservationError, match="one shape"):
        samples.add((torch.zeros(2, 3, 9, 8),), {})
    with pytest.raises(ObservationError, match="arguments"):
        samples.add((torch.zeros(2, 3, 8, 8),), {"mask": torch.zeros(2)})
    with pytest.raises(ObservationError, match="batch dimension"):
        samples.add((3,), {})


def test_missing_samples_and_bad_options() -> None:
    model = small_net()
    pruner = pruner_of(model)
    comp = Compensation()
    with pytest.raises(NotCalibratedError, match="calibrate"):
        comp.step(pruner)
    with pytest.raises(TypeError):
        comp.step(model)
    with pytest.raises(ObservationError), comp.observe(pruner):
        pass
    comp.calibrate(pruner, batches((3, 9, 9)), progress=False)
    comp.step(pruner)
    with pytest.raises(ValueError, match="ridge"):
        Compensation(ridge=-1.0)


def test_dead_channels_and_fewer_samples_than_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    with torch.no_grad():
        model[0].weight[:20] = 0
        model[0].bias[:20] = -1
    for removed in (list(range(10, 30)), list(range(20))):
        pruned = copy.deepcopy(model)
        pruner = removing(pruned, torch.randn(1, 8), {"0": removed})
        report = Compensation().calibrate(pruner, batches((8,), 12, 4), progress=False).step(pruner)
        assert all(p.isfinite().all() for p in pruned.parameters())
        assert report.rows[0].left <= report.rows[0].lost


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("features", [7, 40, 120, 300])
def test_refit_is_ridge_regression(features: int, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 90, features, generator=generator, dtype=torch.float64) + 0.5
    e = torch.randn(2, 90, 3, generator=generator, dtype=torch.float64)
    result = refit(x.clone(), e, 45, affine, ridge=0.1)

    def solve(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (v - v.mean(0) if affine else v for v in (x, e))
        penalty = torch.eye(features, dtype=torch.float64) * (0.1 * a.square().mean() * len(a)).sqrt()
        rows, targets = torch.cat([a, penalty]), torch.cat([b, b.new_zeros(features, 3)])
        delta = torch.linalg.lstsq(rows, targets).solution
        return delta, (e.mean(0) - x.mean(0) @ delta) * affine

    left = 0.0
    for g in range(2):
        delta, constant = solve(x[g], e[g])
        torch.testing.assert_close(result.delta[g], delta)
        if affine:
            torch.testing.assert_close(result.constant[g], constant)
        else:
            assert result.constant is None
        if affine:  # without a constant, halves are not centred, and neither is what is held out
            center = x[g].mean(0)
            for train, test in ((slice(45), slice(45, 90)), (slice(45, 90), slice(45))):
                delta, constant = solve(x[g, train] - center, e[g, train])
                rest = e[g, test] - constant - (x[g, test] - center) @ delta
                left += float(rest.square().mean(0).sum())
    if affine:
        before = sum(float(e[:, half].square().mean(1).sum()) for half in (slice(45), slice(45, 90)))
        assert result.after == pytest.approx(result.before * left / before, rel=1e-6)


@pytest.mark.parametrize("features", [30, 200])
def test_single_precision_gives_what_double_does(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, features, generator=generator) @ torch.randn(features, features, generator=generator)
    e = x[..., :3] * 0.1 + torch.randn(1, 200, 3, generator=generator)
    short, long = (refit(x.to(kind), e.to(kind), 100, True) for kind in (torch.float32, torch.float64))
    assert short.ridge == long.ridge
    assert short.after == pytest.approx(long.after, rel=1e-4)
    torch.testing.assert_close(x.double() @ short.delta, x.double() @ long.delta, rtol=1e-3, atol=1e-4)


def test_refit_leaves_noise_alone_and_takes_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(1, 60, n, generator=generator, dtype=torch.float64) for n in (40, 2))
    left_alone = refit(x, noise, 30, affine=False, margin=0.05)
    assert left_alone.delta is None
    assert left_alone.after == left_alone.before
    found = refit(x, x[..., :2] * 0.5 + 0.01 * noise, 30, affine=False, margin=0.05)
    assert found.delta is not None
    assert found.after < 0.9 * found.before
    one_half = refit(x, x[..., :2], 60, affine=True)
    assert one_half.delta is None
    assert one_half.constant is None


@pytest.mark.parametrize("features", [5, 128, 131])
def test_gram_is_the_product(features: int) -> None:
    x = torch.randn(1, 50, features, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.mT @ x)


LAYERS = {
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 8)),
    "dilation, groups": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(2, 0), groups=2), (4, 9, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 5, padding="same", groups=4), (4, 9, 8)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 4, stride=3, padding=2), (4, 11)),
    "three": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 4, 3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5, 4)),
    "transposed, groups": (
        lambda: nn.ConvTranspose2d(4, 6, (4, 2), stride=(2, 3), dilation=2, groups=2),
        (4, 5, 4),
    ),
    "tokens": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "vector": (lambda: nn.Linear(5, 7), (5,)),
}


@pytest.mark.parametrize("some", [3, 40, 10**6])
@pytest.mark.parametrize("case", LAYERS)
def test_rows_and_matrix_give_the_layers_own_outputs(case: str, some: int) -> None:
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(7, *shape, dtype=torch.float64)
    cut = CutLayer(case, layer)
    with torch.no_grad():
        y = layer(x)
        lead = rows_of(layer, y)
        rows = Rows(lead, choose(torch.Size(lead).numel(), some))
        read = inputs_at(layer, x, rows)
        assert read.shape[2] == cut.features
        wanted = outputs_at(layer, y, rows).unflatten(1, (cut.groups, -1)).transpose(0, 1)
        got = read @ cut.matrix() + layer.bias.view(cut.groups, 1, -1)
        torch.testing.assert_close(got, wanted)
        before = copy.deepcopy(layer.state_dict())
        delta = torch.randn_like(cut.matrix())
        cut.add(delta, torch.ones(cut.groups, wanted.shape[2], dtype=torch.float64))
        after = outputs_at(layer, layer(x), rows).unflatten(1, (cut.groups, -1)).transpose(0, 1)
        torch.testing.assert_close(after, wanted + read @ delta + 1)
        cut.undo()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("total", [1, 2, 7, 64, 1000])
def test_chosen_positions_are_different_and_everywhere(total: int) -> None:
    for some in {1, (total + 1) // 2, total, 2 * total}:
        chosen = choose(total, some)
        assert len(chosen) == len(chosen.unique()) == min(some, total)
        gaps = torch.cat([chosen.sort().values, torch.tensor([total])]).diff(prepend=torch.tensor([-1]))
        assert int(gaps.max()) <= 2 * total / min(some, total) + 1


def test_layers_after_a_cut_are_repaired_too() -> None:
    """A layer that lost nothing reads other values than before, and gives nearly what it gave."""
    torch.manual_seed(0)
    make = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    model = nn.Sequential(*make, nn.Conv2d(6, 4, 1)).eval()
    original, loader = copy.deepcopy(model), batches((3, 12, 12), 128)
    pruner = removing(model, loader[0][:1], {"0": list(range(8))})
    report = Compensation().calibrate(pruner, loader, progress=False).step(pruner)
    assert [(row.name, row.removed) for row in report.rows] == [("2", 8), ("4", 0), ("6", 0)]
    assert report.rows[0].left < 0.5 * report.rows[0].lost
    assert all(row.left <= row.lost for row in report.rows)
    only_first = copy.deepcopy(original)
    pruner = removing(only_first, loader[0][:1], {"0": list(range(8))})
    pruner.step()
    only_first[2].load_state_dict(model[2].state_dict())
    x = torch.randn(64, 3, 12, 12)
    errors = [float((net(x) - original(x)).norm()) for net in (model, only_first)]
    assert errors[0] < errors[1]


def test_a_layer_with_a_forward_of_its_own_is_left_alone_and_reported():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.flatten(1).std(1).view(-1, 1, 1, 1)
            return nn.functional.conv2d(x, weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Standardized(8, 4, 1)).eval()
    x = torch.randn(16, 3, 5, 5)
    pruner = tp.pruner.BasePruner(
        model,
        x[:1],
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model[2]],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    before = model[2].weight.detach().clone()
    comp = Compensation().calibrate(pruner, [x], progress=False)
    (row,) = comp.step(pruner).rows
    assert "something else than its weight" in row.skipped
    assert model[2].weight.shape[1] == 4
    assert all(any(torch.equal(kept, old) for old in before.unbind(1)) for kept in model[2].weight.unbind(1))


def test_the_classifier_of_a_timm_network_is_refitted():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    assert type(model.classifier).forward is not nn.Linear.forward
    x = torch.randn(24, 3, 32, 32)
    pruner = removing(model, x[:1], {"conv_head": list(range(0, 1024, 2))}, ignored_layers=[model.classifier])
    comp = Compensation().calibrate(pruner, [x], progress=False)
    row = next(row for row in comp.step(pruner).rows if row.name == "classifier")
    assert not row.skipped
    assert row.left < row.lost
