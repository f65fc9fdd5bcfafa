"""Compensation on models that mix, draw, share or break: right, or left alone with the reason, never worse."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from ippro_tp import Compensation, ObservationError
from ippro_tp.compensation import fitting, regression
from ippro_tp.compensation.passes import PeakBytes, output_error, reproducibly
from ippro_tp.compensation.rollback import Snapshot

from .test_compensation import removing


def compensated(model: nn.Module, batches: list, removals: dict[str, list[int]], example=None, **options):
    """Prune ``removals`` with compensation; returns the report."""
    pruner = removing(model, batches[0][:1] if example is None else example, removals, **options)
    return Compensation().calibrate(pruner, batches, progress=False).step(pruner)


def cut(model: nn.Module, example, removals: dict[str, list[int]]) -> nn.Module:
    """A copy, pruned without compensation."""
    plain = copy.deepcopy(model)
    removing(plain, example, removals).step()
    return plain


def error(model: nn.Module, reference: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad():
        return float((model(*inputs) - reference(*inputs)).square().mean())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- which rows are whose --------------------------------------------------------------------------------------


class Views(nn.Module):
    """Two views in one batch, views slowest; samples are compared after the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x.flip(-1) * 2])
        one, two = self.b(F.relu(self.a(both))).chunk(2)
        return self.head(one - two)


class Apart(Views):
    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.b(F.relu(self.a(v))) for v in (x, x.flip(-1) * 2))
        return self.head(one - two)


def test_views_in_one_batch_are_fitted_as_one_by_one() -> None:
    """More samples than go through at once: rows of the first view must not be compared with the second's."""
    torch.manual_seed(0)
    model, x, new = Views().eval(), torch.randn(200, 6), torch.randn(100, 6)
    reference, removals = copy.deepcopy(model), {"a": [1, 3, 5, 9, 10, 14]}
    apart = Apart().eval()
    apart.load_state_dict(model.state_dict())
    plain = error(cut(model, x[:1], removals), reference, new)
    report = compensated(model, [x], removals)
    assert not any(row.skipped for row in report.rows), str(report)
    assert error(model, reference, new) < 0.8 * plain
    compensated(apart, [x], removals)  # each layer is called twice there, and fitted to the same rows
    torch.testing.assert_close(apart.b.weight, model.b.weight, rtol=1e-3, atol=1e-4)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:  # (samples, time, 6)
        return self.b(F.relu(self.a(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("steps", [2, 3, 64])
def test_samples_may_lie_along_any_dimension(steps: int) -> None:
    torch.manual_seed(0)
    model, x, new = TimeMajor().eval(), torch.randn(64, steps, 6), torch.randn(50, steps, 6)
    reference, removals = copy.deepcopy(model), {"a": [1, 3, 5, 9, 10, 14]}
    plain = error(cut(model, x[:1], removals), reference, new)
    report = compensated(model, [x], removals)
    assert not any(row.skipped for row in report.rows)
    assert error(model, reference, new) < 0.7 * plain


class Mixing(nn.Module):
    """Every sample reads all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x - x.mean(0))


def test_a_layer_that_reads_mixed_samples_is_left() -> None:
    torch.manual_seed(0)
    model, x = Mixing().eval(), torch.randn(40, 6)
    plain = cut(model, x[:1], {"a": [0, 5]})
    report = compensated(model, [x], {"a": [0, 5]})
    assert "one sample each" in report.rows[0].skipped
    assert torch.equal(model.b.weight, plain.b.weight)


# -- what a layer is, and how often it runs --------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.twice(F.relu(self.twice(F.relu(self.a(x)))))))


def test_a_layer_called_twice_is_fitted_to_both_calls() -> None:
    torch.manual_seed(0)
    model, x, new = Twice().eval(), torch.randn(256, 6), torch.randn(200, 6)
    reference, removals = copy.deepcopy(model), {"twice": [1, 2, 7, 11, 13, 20]}
    plain = cut(model, x[:1], removals)
    report = compensated(model, [x], removals)
    row = next(row for row in report.rows if row.name == "twice")
    assert not row.skipped
    assert row.left < row.lost
    assert error(model, reference, new) < 0.7 * error(plain, reference, new)


class Shared(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).mean(1)
        return self.head(x + 3 * self.down(F.relu(self.up(x))))


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_weight_is_left_alone(tied: bool) -> None:
    torch.manual_seed(0)
    model, x = Shared(tied).eval(), torch.randint(0, 20, (256, 4))
    before = model.table.weight.detach().clone()
    removals = {"up": list(range(0, 32, 2))}
    report = compensated(model, [x], removals, ignored_layers=[model.table, model.head, model.down])
    rows = {row.name: row for row in report.rows}
    assert torch.equal(model.table.weight, before)
    assert rows["down"].left < rows["down"].lost
    assert ("shared: table.weight, head.weight" in rows["head"].skipped) is tied


class Borrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        return y + (self.b.weight.sum(1) if x.dtype.is_floating_point else 0)


def test_a_weight_that_is_used_outside_of_its_layer_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Borrowing().eval(), torch.randn(40, 6)
    report = compensated(model, [x], {"a": [0, 5]})
    assert "used outside" in report.rows[0].skipped


class _Casting(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class _Normed(nn.Linear):
    """As if plain at first: the weight has the norm that is divided by."""

    def __init__(self, *size):
        super().__init__(*size)
        self.weight.data /= self.weight.norm()

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class _Picky(nn.Linear):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


class _SamePadding(nn.Conv2d):
    """As timm's Conv2dSame: pads on the right and below first, by how large the input is."""

    def forward(self, x):
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        high, wide = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes)
        return super().forward(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


@pytest.mark.parametrize(("layer", "fit"), [(_Casting, True), (_Normed, False), (_Picky, False)])
def test_a_layer_is_known_by_what_it_computes(layer, fit: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), layer(16, 5)).eval(), torch.randn(40, 6)
    before = model[2].weight.detach().clone()
    report = compensated(model, [x], {"0": [1, 2, 3]}, ignored_layers=[model[2]])
    assert ("something else" not in report.rows[0].skipped) is fit
    kept = [i for i in range(16) if i not in (1, 2, 3)]
    assert torch.equal(model[2].weight, before[:, kept]) is not fit


def test_padding_as_in_tensorflow_is_understood() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), _SamePadding(12, 6, 3, stride=2)).eval()
    x, reference = torch.randn(64, 3, 11, 12), copy.deepcopy(model)
    plain = cut(model, x[:1], {"0": [1, 2, 3, 7]})
    report = compensated(model, [x], {"0": [1, 2, 3, 7]})
    assert not report.rows[0].skipped
    new = torch.randn(32, 3, 11, 12)
    assert error(model, reference, new) < 0.7 * error(plain, reference, new)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.table, self.stack, self.head = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.stack(self.table(ids), src_key_padding_mask=mask)[:, 0])


def test_a_transformer_with_a_padding_mask_is_refitted_with_its_attention() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    ids, mask = torch.randint(0, 30, (64, 7)), torch.arange(7).expand(64, -1) >= torch.randint(3, 7, (64, 1))
    keep = [
        model.table,
        model.head,
        *(x for layer in model.stack.layers for x in (layer.self_attn, layer.linear2)),
    ]
    removals = {f"stack.layers.{i}.linear1": list(range(0, 32, 3)) for i in (0, 1)}
    modules = dict(model.named_modules())
    scores = {modules[n]: gone for n, gone in removals.items()}
    pruner = tp.pruner.BasePruner(
        model, {"ids": ids[:1], "mask": mask[:1]}, pruning_ratio=11 / 32, ignored_layers=keep, num_heads={},
        importance=lambda g: torch.tensor([float(i not in scores[g[0].dep.target.module]) for i in g[0].idxs]),
        in_channel_groups={}, out_channel_groups={}, channel_groups={},
    )  # fmt: skip
    fused = torch.backends.mha.get_fastpath_enabled()
    report = Compensation().calibrate(pruner, [{"ids": ids, "mask": mask}], progress=False).step(pruner)
    assert torch.backends.mha.get_fastpath_enabled() is fused
    rows = {row.name: row for row in report.rows}
    assert not any(row.skipped for row in report.rows), str(report)
    assert {f"stack.layers.1.self_attn.{p}_proj" for p in ("q", "k", "v", "out")} <= rows.keys()
    assert rows["stack.layers.0.linear2"].left < rows["stack.layers.0.linear2"].lost
    assert report.after < report.before
    assert not any("forward" in vars(m) for m in model.modules())


def test_projections_of_attention_whose_width_is_pruned_are_refitted() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.attention(x, x, x, need_weights=False)[0])

    model, x, new = Net().eval(), torch.randn(96, 6, 5), torch.randn(64, 6, 5)
    reference, removals = copy.deepcopy(model), {"first": [2, 5, 10, 13]}
    plain = cut(model, x[:1], removals)
    report = compensated(model, [x], removals)
    rows = {row.name: row for row in report.rows}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        row = rows[f"attention.{part}"]
        assert (row.kept, row.removed, row.skipped) == (12, 4, "")
        assert row.left <= row.lost
    assert model.attention.in_proj_weight.shape == (36, 12)
    assert not torch.equal(model.attention.in_proj_weight, plain.attention.in_proj_weight)
    assert error(model, reference, new) < 0.5 * error(plain, reference, new)


# -- noise, NaN, and models that do not repeat -----------------------------------------------------------------


class Noisy(nn.Module):
    """Draws in eval, as a variational autoencoder does; ``wide``: as many numbers as there are hidden channels."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.a, self.mean, self.b, self.c = nn.Linear(6, 24), nn.Linear(24, 8), nn.Linear(8, 24), nn.Linear(24, 6)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + torch.randn_like(x) if self.wide else x
        x = self.mean(x)
        return self.c(F.relu(self.b(x + torch.randn_like(x))))


def test_the_same_noise_is_drawn_before_and_after_the_cut() -> None:
    torch.manual_seed(0)
    model, x, codes = Noisy(False).eval(), torch.randn(256, 6), torch.randn(200, 8)
    reference, removals = copy.deepcopy(model), {"a": [1, 5, 8, 20], "b": [0, 3, 11, 17]}
    plain = cut(model, x[:1], removals)
    pruner = removing(model, x[:1], removals)
    comp = Compensation().calibrate(pruner, [x], progress=False)
    state = torch.get_rng_state()
    report = comp.step(pruner)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(row.skipped for row in report.rows)

    def off(net: nn.Module) -> float:
        with torch.no_grad():
            decoded = [n.c(F.relu(n.b(codes))) for n in (net, reference)]
        return float((decoded[0] - decoded[1]).square().mean())

    assert off(model) < 0.7 * off(plain)


def test_layers_after_noise_that_the_cut_changes_are_left() -> None:
    torch.manual_seed(0)
    model, x = Noisy(True).eval(), torch.randn(64, 6)
    plain = cut(model, x[:1], {"a": [1, 5]})
    report = compensated(model, [x], {"a": [1, 5]})
    assert all("draws random numbers" in row.skipped for row in report.rows)
    assert torch.equal(model.mean.weight, plain.mean.weight)


class Counting(nn.Module):
    """Gives other values each time, from something that torch's random state does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 16), nn.Linear(16, 5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(F.relu(self.a(x + self.calls)))


def test_a_model_that_does_not_repeat_is_refused_before_the_cut() -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(40, 6)
    pruner = removing(model, x[:1], {"a": [0, 1]})
    comp = Compensation().calibrate(pruner, [x], progress=False)
    before, calls = weights(model), model.calls
    with pytest.raises(ObservationError, match="run again"):
        comp.step(pruner)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.calls, pruner.current_step, pruner.pruning_history()) == (calls, 0, [])


class Late(nn.Module):
    """Changes what it computes from the 200th sample on, so that a few samples do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x * (1 + (len(x) > 100) * self.cut())))
        return self.c(F.relu(self.b(hidden)))

    def cut(self) -> float:
        return float(self.b.out_features < 8)


def test_an_error_before_the_first_cut_takes_everything_back() -> None:
    torch.manual_seed(0)
    model, x = Late().eval(), torch.randn(300, 6)
    plain = cut(model, x[:1], {"b": [2, 3]})
    report = compensated(model, [x], {"b": [2, 3]})
    assert "'a' gives other values" in report.reverted
    assert report.reverted in str(report)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_samples_with_nan_are_left_out_with_a_warning() -> None:
    x = torch.randn(64, 6)
    x[3, 2], x[9, 0] = float("nan"), float("inf")
    model, clean = small(), small()
    with pytest.warns(RuntimeWarning, match="2 of 64 samples hold NaN or inf"):
        report = compensated(model, [x], {"0": [1, 2, 3]}, example=torch.zeros(1, 6))
    assert "nan" not in str(report)
    compensated(clean, [x[x.isfinite().all(1)]], {"0": [1, 2, 3]})
    assert all(torch.equal(v, clean.state_dict()[k]) for k, v in model.state_dict().items())


def test_samples_that_all_hold_nan_are_refused_before_the_cut() -> None:
    model, x = small(), torch.full((8, 6), float("nan"))
    pruner = removing(model, torch.zeros(1, 6), {"0": [1]})
    comp = Compensation().calibrate(pruner, [x], progress=False)
    with pytest.raises(ObservationError, match="all samples"):
        comp.step(pruner)
    assert model[0].out_features == 16


def test_rows_that_become_nan_inside_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.b(torch.where(x[:, :1] > 1.5, torch.nan, h))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(128, 6)
    report = compensated(model, [x], {"a": [1, 2, 3]})
    assert report.rows[0].left < report.rows[0].lost
    assert all(p.isfinite().all() for p in model.parameters())
    assert "nan" not in str(report)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_no_report_prints_nan(samples: int) -> None:
    text = str(compensated(small(), [torch.randn(samples, 6)], {"0": [1, 2, 3]}))
    assert "nan" not in text, text


# -- never worse, and undone on errors -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-4.0, float("inf")])
def test_what_makes_the_outputs_worse_is_taken_back(value: float, monkeypatch) -> None:
    model, x = small(), torch.randn(64, 6)
    plain = cut(model, x[:1], {"0": [1, 2, 3]})

    def wrong(x, e, *args):
        found = regression.refit(x, e, *args)
        return dataclasses.replace(found, delta=torch.full((len(x), x.shape[2], e.shape[2]), value))

    monkeypatch.setattr(fitting, "refit", wrong)
    report = compensated(model, [x], {"0": [1, 2, 3]})
    assert report.after > report.before
    assert "became worse" in str(report)
    assert "nan" not in str(report)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def test_output_error_counts_each_tensor_alike_and_names_nan() -> None:
    a, b = torch.randn(20, 3), 1e4 * torch.randn(20, 2)
    assert output_error({"x": a, "y": [b]}, {"x": a, "y": [b]}) == 0.0
    zero = output_error({"x": a, "y": [0 * b]}, {"x": a, "y": [b]})
    spread = float(b.square().sum() / (b - b.mean(0)).square().sum())
    assert zero == pytest.approx(spread / 2)
    assert output_error((a * torch.nan,), (a,)) == math.inf
    assert output_error((a[:, :2],), (a,)) is None
    assert output_error((torch.ones(3, dtype=torch.long),), (torch.ones(3, dtype=torch.long),)) is None


class Failing(Exception):
    pass


@pytest.mark.parametrize("when", ["repair", "second group", "first pass", "cut pass"])
def test_a_step_that_fails_leaves_everything_as_it_was(when: str, monkeypatch) -> None:
    model, x = small(), torch.randn(64, 6)
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    pruner = removing(model, x[:1], {"0": [1, 2], "2": [0]})
    model.train()
    comp = Compensation().calibrate(pruner, [x], progress=False)
    before = weights(model)
    owned = [(p, p.grad) for p in model.parameters()]
    attributes = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()]

    def fail(*args):
        raise Failing

    steps = {"count": 0}

    def fail_when_cut(module, args):
        if (module.in_features < 16) is (when == "cut pass"):
            raise Failing

    if when == "second group":
        prune = tp.dependency.Group.prune

        def second(group, *args, **kwargs):
            steps["count"] += 1
            if steps["count"] == 2:
                raise Failing
            return prune(group, *args, **kwargs)

        monkeypatch.setattr(tp.dependency.Group, "prune", second)
    elif when != "repair":
        handle = model[2].register_forward_pre_hook(fail_when_cut)
    with pytest.raises(Failing):
        comp.step(pruner, repair=fail if when == "repair" else None)
    if "pass" in when:
        handle.remove()
    monkeypatch.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [(p, p.grad) for p in model.parameters()] == owned
    assert [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()] == attributes
    assert (pruner.current_step, pruner.pruning_history()) == (0, [])
    assert comp.step(pruner).rows  # and the step can be made after all
    assert model[0].out_features == 14


def test_a_snapshot_restores_what_pruning_changes_in_graph_and_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8))
            self.sizes = [8, 3]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale)

    model = Net()
    pruner = removing(model, torch.randn(1, 6), {"a": [1, 2]})
    parameters, kept = dict(model.named_parameters()), weights(model)
    before = Snapshot(model, pruner)
    pruner.step()
    model.sizes[0] = 6
    model.extra = 1
    with torch.no_grad():
        model.b.bias.zero_()
    assert model.scale.shape == (6,)
    before.restore()
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert model.sizes == [8, 3]
    assert not hasattr(model, "extra")
    pruner.step()
    assert model.scale.shape == (6,)


# -- memory, devices, states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1 << 19, 1 << 21])
def test_memory_bounds_what_lives_in_a_pass(memory: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(256, 3, 16, 16)
    pruner = removing(model, x[:1], {"0": [1, 2]})
    comp = Compensation(memory=memory).calibrate(pruner, [x], progress=False)
    peaks, sizes, run = [], [], model.forward

    def counted(x: Tensor) -> Tensor:
        with PeakBytes() as found:
            y = run(x)
        peaks.append(found.peak)
        sizes.append(len(x))
        return y

    model.forward = counted
    report = comp.step(pruner)
    assert report.rows
    assert max(peaks) <= memory
    assert max(peaks) > memory / 8  # the room is used
    assert max(sizes) < 256


def test_peak_counts_what_lives_at_a_time() -> None:
    with PeakBytes() as found:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1
        del a
        c = b + 1
        c.view(10, 10).add_(1)
    assert found.peak == 800


def test_a_state_of_something_else_keeps_the_samples() -> None:
    model, x = small(), torch.randn(64, 6)
    pruner = removing(model, x[:1], {"0": [1]})
    comp = Compensation().calibrate(pruner, [x], progress=False)
    good = comp.state_dict()
    for bad in ({}, {**good, "count": 3}, {**good, "spec": "[]"}, {**good, "leaves": []}, {"leaves": 3}):
        with pytest.raises(ValueError, match="calibrate again"):
            comp.load_state_dict(bad)
    assert comp.step(pruner).rows


def test_reproducibly_restores_what_it_sets() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    state, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()

    def fail() -> None:
        with reproducibly(model):
            assert not model.training
            torch.randn(3)
            raise Failing

    with pytest.raises(Failing):
        fail()
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() is fused


def test_a_bfloat16_model_is_refitted():
    """Its rounding is coarse, but what a cut does to a layer is no rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        net[0].weight[:16], net[0].bias[:16] = 0, 2.0  # constant channels, which a bias makes up for
        net[2].weight[:, :16] += 0.5
    net = net.to(torch.bfloat16).eval()
    x = torch.randn(256, 16, dtype=torch.bfloat16)
    wanted = net(x).float()
    errors = []
    for compensated in (False, True):
        model = copy.deepcopy(net)
        importance = lambda group: torch.arange(len(group[0].idxs), dtype=torch.float32)  # noqa: E731
        pruner = tp.pruner.BasePruner(
            model, x[:1], importance, pruning_ratio=0.25, ignored_layers=[model[2], model[4]]
        )
        if compensated:
            Compensation().calibrate(pruner, x.split(64), progress=False).step(pruner)
        else:
            pruner.step()
        errors.append(float((model(x).float() - wanted).square().mean().detach()))
    assert errors[1] < 0.05 * errors[0]


def test_a_layer_that_lends_its_weight_and_is_not_called_is_skipped():
    class Lent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lent, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(F.relu(F.linear(F.relu(self.first(x)), self.lent.weight, self.lent.bias)))

    torch.manual_seed(0)
    model, x = Lent().eval(), torch.randn(64, 6)
    pruner = tp.pruner.BasePruner(
        model, x[:1], tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[model.first, model.last]
    )
    report = Compensation().calibrate(pruner, x.split(16), progress=False).step(pruner)
    assert model(x).isfinite().all()
    assert all(row.name != "lent" or row.skipped for row in report.rows)
