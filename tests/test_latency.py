"""Latency tables and latency targets, on a clock that tells the time an operation should take: no real times."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ippro_tp import LatencyTable, LatencyTableError, PROImportance, TargetError, prune
from ippro_tp.graph import groups
from ippro_tp.graph.groups import groups_of, read_group
from ippro_tp.pruning.latency import timing
from ippro_tp.pruning.latency.operations import Shape, record
from ippro_tp.pruning.latency.surface import (
    Surface,
    alignment,
    factors_of,
    knots_of,
    points_of,
    probes_of,
    stairs_of,
    step_of,
)
from ippro_tp.pruning.latency.widths import reach
from ippro_tp.pruning.structure import read_structure


class FakeClock(TorchDispatchMode):
    """Seconds go by with the operations that run while it is entered, and with nothing else.

    Args:
        step: convolutions and matrix products take as long as with widths rounded up to a multiple of it.
        look: seconds that each look at the clock takes.
    """

    def __init__(self, step: int = 1, look: float = 0.0) -> None:
        super().__init__()
        self.now, self.step, self.look = 0.0, step, look

    def __call__(self) -> float:
        self.now += self.look
        return self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.now += self.seconds(
            func, [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)], out
        )
        return out

    def seconds(self, func, tensors, out) -> float:
        """0.1 s a million multiply-accumulates, 1 s a million elements, and 1 ms a call."""
        name = str(func)
        if name.startswith(("aten.conv2d", "aten.linear")):
            weight = tensors[1]
            sizes = [-(-n // self.step) * self.step if n > 3 else n for n in weight.shape]
            positions = out.numel() // out.shape[1 if "conv" in name else -1]
            macs = positions
            for n in sizes:
                macs *= n
            return 1e-3 + 1e-7 * macs
        elements = sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return 1e-3 + 1e-6 * elements if name.startswith(("aten.batch_norm", "aten.relu", "aten.add")) else 0.0


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.project = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    """Every round tells the same time."""
    monkeypatch.setattr(timing, "ROUNDS", (1, 1))
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    monkeypatch.setattr(timing, "FEW_CALLS", 1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.ones(1, 3, 12, 12)


def measured(model, clock, x=X):
    with clock:
        return LatencyTable.measure(model, x, timer=clock)


def fake_time(model, step=1, x=X):
    clock = FakeClock(step)
    with torch.inference_mode(), clock:
        model(x)
    return clock.now


# -- what ran, and what changes --------------------------------------------------------------------------------


def test_an_operation_runs_again_on_other_sizes(net):
    ops = [op for op in record(net, X) if op.computes]
    assert [op.name.split(".")[1] for op in ops[:3]] == ["conv2d", "batch_norm", "relu"]
    assert not any(op.name.startswith(("aten.view", "aten.transpose")) for op in ops)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_shape_keeps_the_memory_format(form):
    x = torch.zeros(2, 3, 4, 5).to(memory_format=form)
    assert Shape.of(x).strides((2, 7, 4, 5)) == list(torch.zeros(2, 7, 4, 5).to(memory_format=form).stride())
    assert Shape.of(torch.zeros(2, 1).expand(2, 9)).elements((2, 9)) == 2


def test_sizes_follow_the_groups_they_lose_channels_with(net):
    structure = read_structure(net, X)
    reached = reach(structure, X)
    rows = {v.operation.name: [dict(x.row) for x in v.variables] for v in reached.operations}
    stem, inner = sorted(structure.groups, key=lambda key: structure.groups[key].record.width)
    first = next(v for v in reached.operations if v.operation.name.startswith("aten.conv2d"))
    assert [v.row for v in first.variables] == [((stem, 1),)]
    convs = [v for v in reached.operations if v.operation.name.startswith("aten.conv2d")]
    depthwise = convs[2]
    assert [v.row for v in depthwise.variables] == [((inner, 1),)]
    assert depthwise.sizes((100,))[-1] == 100, "the number of groups follows"
    assert {v.row for v in convs[1].variables} == {((stem, 1),), ((inner, 1),)}
    assert rows["aten.batch_norm.default"] == [{stem: 1}]
    assert reached.gauges[inner].width == 128


def test_concatenated_groups_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(14, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))

    model = Two().eval()
    reached = reach(read_structure(model, X), X)
    conv = [v for v in reached.operations if v.operation.name.startswith("aten.conv2d")][2]
    assert {frozenset(dict(v.row)) for v in conv.variables} == {
        frozenset({"a.out", "b.out"}),
        frozenset({"c.out"}),
    }


def test_heads_of_attention_go_whole():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=4).eval()
    x = torch.zeros(1, 3, 32, 32)
    reached = reach(read_structure(vit, x), x)
    attention = next(v for v in reached.operations if "attention" in v.operation.name)
    assert [v.full for v in attention.variables] == [4]


# -- surfaces --------------------------------------------------------------------------------------------------


def test_between_knots_times_are_linear():
    knots = (knots_of(64, 1, 4), knots_of(20, 1, 3))
    seconds = {at: 3.0 + 2 * at[0] + 5 * at[1] + at[0] * at[1] for at in points_of(knots)}
    surface = Surface(knots, seconds)
    for at in [(64, 20), (33, 7), (1, 1), (50, 19)]:
        assert surface.at(at) == pytest.approx(3.0 + 2 * at[0] + 5 * at[1] + at[0] * at[1])


def test_many_widths_are_measured_one_by_one():
    knots = ((2, 4), (3, 6), (5, 10))
    seconds = {at: float(sum(at)) for at in points_of(knots)}
    assert len(seconds) == 4
    assert Surface(knots, seconds).at((3, 4, 7)) == pytest.approx(14.0)


def test_the_steps_of_a_staircase_are_kept():
    def true(width):
        return float(-(-width // 8) * 8)

    knots = (knots_of(128, 1, 5),)
    surface = Surface(knots, {at: true(at[0]) for at in points_of(knots)})
    probes = {at: true(at[0]) for at in probes_of((128,), 0, 1)}
    surface = Surface(knots, surface.seconds, steps=(step_of(stairs_of(0, probes)),))
    surface = replace(surface, factors=factors_of(surface, [probes]))
    for width in (127, 121, 100, 81):
        assert surface.at((width,)) == pytest.approx(true(width), rel=0.06), width
    assert surface.steps == (8,)
    assert alignment(48) == 16


# -- tables ----------------------------------------------------------------------------------------------------


def test_a_table_sums_up_to_the_whole_and_predicts_pruned_models(net):
    clock = FakeClock()
    table = measured(net, clock)
    assert table.whole == pytest.approx(fake_time(net))
    assert abs(table.error) < 1e-6
    assert abs(table.held_out_error) < 0.03
    pruned = copy.deepcopy(net)
    pruner = tp.pruner.BasePruner(
        pruned, X, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.4, ignored_layers=[pruned.head]
    )
    pruner.step()
    assert table.predict(pruned) == pytest.approx(fake_time(pruned), rel=0.03)
    assert table.predict(net) == pytest.approx(table.whole)


def test_what_lies_between_operations_is_told_and_kept(net):
    table = measured(net, FakeClock(look=1e-2))
    assert abs(table.held_out_error) < 0.1
    assert "off by" in str(table)


def test_measuring_leaves_the_model_alone(net):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    measured(net, FakeClock())
    assert net.training
    assert net.norm.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in net.parameters())


def test_a_cost_is_the_time_that_goes_with_a_channel(net):
    table = measured(net, FakeClock())
    graph = tp.DependencyGraph().build_dependency(net, X)
    records = [r for r in map(read_group, groups_of(graph)) if r.producers]
    structure = read_structure(net, X)
    for key in structure.groups:
        root = key.removesuffix(".out")  # Torch-Pruning's own graph may name the group after another layer
        record = next(r for r in records if root in {layer.name for layer in r.producers})
        lost = copy.deepcopy(net)
        unit = torch.arange(8)
        group = next(
            g for g in groups_of(tp.DependencyGraph().build_dependency(lost, X)) if read_group(g).key == record.key
        )
        lost_graph = group._DG
        dep = group[0].dep
        lost_graph.get_pruning_group(dep.target.module, dep.handler, unit.tolist()).prune()
        expected = (fake_time(net) - fake_time(lost)) / 8
        assert table.cost(record, net) == pytest.approx(expected, rel=0.1)


def test_an_importance_takes_a_table_for_its_cost(net):
    table = measured(net, FakeClock())
    imp = PROImportance(cost=table)
    pruner = tp.pruner.BasePruner(
        net, X, importance=imp, global_pruning=True, pruning_ratio=0.3, ignored_layers=[net.head]
    )
    imp.calibrate(pruner, [torch.randn(8, 3, 12, 12)], progress=False)
    pruner.step()
    assert net.expand.out_channels < 128


@pytest.mark.parametrize(("step", "expected"), [(1, None), (8, 8), (16, 16)])
def test_the_staircase_says_what_to_round_to(step, expected):
    table = measured(Net(64).eval(), FakeClock(step))
    assert table.round_to == expected


# -- saving ----------------------------------------------------------------------------------------------------


def test_a_saved_table_predicts_the_same(net, tmp_path):
    table = measured(net, FakeClock(8))
    loaded = LatencyTable.load(table.save(tmp_path / "table.json"))
    loaded.check(net, X)
    gone = {key: gauge.units // 3 for key, gauge in table.gauges.items()}
    assert loaded.seconds(gone) == table.seconds(gone)
    assert (loaded.error, loaded.round_to) == (table.error, table.round_to)


def test_a_table_of_another_machine_is_refused(net, tmp_path):
    path = measured(net, FakeClock()).save(tmp_path / "table.json")
    state = json.loads(path.read_text())
    state["identity"]["threads"] += 3
    path.write_text(json.dumps(state))
    with pytest.raises(LatencyTableError, match=r"threads .*override=True"):
        LatencyTable.load(path)
    assert LatencyTable.load(path, override=True).whole > 0
    path.write_text("{}")
    with pytest.raises(LatencyTableError, match="not a latency table"):
        LatencyTable.load(path)


@pytest.mark.parametrize("other", ["batch", "dtype", "format", "model"])
def test_a_table_holds_for_what_it_was_measured_with(net, other):
    table = measured(net, FakeClock())
    model, x = net, X
    if other == "batch":
        x = X.repeat(4, 1, 1, 1)
    elif other == "dtype":
        model, x = copy.deepcopy(net).bfloat16(), X.bfloat16()
    elif other == "format":
        model, x = copy.deepcopy(net).to(memory_format=torch.channels_last), X
    else:
        model = Net(64)
    with pytest.raises(LatencyTableError):
        table.check(model, x)


# -- prune(latency=) -------------------------------------------------------------------------------------------


def pruned(net, clock, monkeypatch, **options):
    monkeypatch.setattr(timing, "wall_clock", clock)
    with clock:
        return prune(net, X, [torch.randn(16, 3, 12, 12)], progress=False, **options)


@pytest.mark.parametrize("target", [0.7, 0.4])
def test_a_latency_is_met(net, monkeypatch, target):
    result = pruned(net, FakeClock(), monkeypatch, latency=target)
    assert result.latency == pytest.approx(target, rel=0.05)
    assert fake_time(result.model) / fake_time(net) == pytest.approx(target, rel=0.05)
    assert result.predicted_latency == pytest.approx(target, rel=0.05)
    assert "predicted" in str(result)


def test_a_wrong_prediction_is_corrected(net, monkeypatch):
    def off(self, gone):
        return LatencyTable._sum(self, gone) ** 2

    monkeypatch.setattr(LatencyTable, "seconds", off)
    result = pruned(net, FakeClock(), monkeypatch, latency=0.6)
    assert result.latency == pytest.approx(0.6, rel=0.05)
    assert abs(result.predicted_latency - 0.6) > 0.05


def test_a_latency_in_steps_and_from_a_table(net, monkeypatch):
    clock = FakeClock()
    table = measured(net, clock)
    result = pruned(net, clock, monkeypatch, latency=0.6, steps=2, latency_table=table, compensation=False)
    assert result.latency == pytest.approx(0.6, rel=0.05)
    with pytest.raises(LatencyTableError):
        pruned(Net(64).eval(), clock, monkeypatch, latency=0.6, latency_table=table)


def test_a_latency_out_of_reach_is_refused(net, monkeypatch):
    with pytest.raises(TargetError, match="latency"):
        pruned(net, FakeClock(), monkeypatch, latency=0.02)


def test_groups_of_a_pruner_are_read_once(net, monkeypatch):
    reads = []
    monkeypatch.setattr(groups, "groups_of", lambda target: reads.append(target) or groups_of(target))
    pruner = tp.pruner.BasePruner(
        net, X, importance=tp.importance.RandomImportance(), pruning_ratio=0.3, ignored_layers=[net.head]
    )
    first = groups.records_of(pruner)
    assert groups.records_of(pruner) is first
    pruner.step()
    assert [r.width for r in groups.records_of(pruner)] != [r.width for r in first]
    assert len(reads) == 2
    structure = read_structure(net, X)
    assert set(structure.groups) == {r.key for r in groups.records_of(structure)}
    assert len(reads) == 2
