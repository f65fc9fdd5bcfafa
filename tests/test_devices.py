"""Statistics and scores stay on the device of the model, and the host does not wait for it; shown without one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import (
    Compensation,
    FisherNoise,
    LogitNoise,
    PROImportance,
    SpaSPImportance,
    attention_heads,
    update_attention,
)

from .nets import CASES, make_pruner
from .otherdevice import Held, OtherDevice, move, numbers, to_other

MAKERS = {
    "expected": PROImportance,
    "squares": lambda: PROImportance(power=2, reference="origin"),
    "mean": lambda: PROImportance(reference="mean"),
    "single": lambda: PROImportance(group_reduction="mean"),
    "log": lambda: PROImportance(depletion="log"),
    "compensated": lambda: PROImportance(compensated=True),
    "paper": lambda: PROImportance("paper", step_size=0.5),
    "spasp": SpaSPImportance,
    "spasp gated": lambda: SpaSPImportance(signed="gated"),
}
NAMES = list(CASES)


KINDS = [(n, m) for n in NAMES for m in MAKERS if (n, m) != ("transposed", "spasp gated")]
FEW = [(n, m) for n, m in KINDS if n in ("residual", "transposed")]


def failing(values, reason, fails):
    """Parameters of which those that are known to fail are marked."""
    return [
        pytest.param(*value, marks=pytest.mark.xfail(strict=True, reason=reason) if fails(*value) else ())
        for value in values
    ]


def groups_of(pruner):
    return list(
        pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    )


def setting(case, imp, other, **options):
    """A pruner, and batches, on the CPU or on the other device."""
    model, (x, labels) = case.model(), case.inputs(12)
    place = to_other if other else torch.clone
    model = move(model) if other else model
    ignored = [model.get_submodule(n) for n in case.ignored]
    pruner = make_pruner(model, place(x[:1]), imp, ignored, **options)
    return pruner, [(place(a), place(b)) for a, b in zip(x.split(3), labels.split(3), strict=True)]


def calibrated(case, make, other, batches=None, **options):
    imp = make()
    pruner, own = setting(case, imp, other, **options)
    imp.calibrate(pruner, batches or own, F.cross_entropy, progress=False)
    return imp, pruner


def assert_close(found, wanted, rtol=1e-8):
    for a, b in zip(found, wanted, strict=True):
        a, b = numbers(a), numbers(b)
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# -- the device itself -------------------------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_meet():
    x, y = torch.arange(4.0), to_other(torch.arange(4.0))
    with OtherDevice() as device:
        assert y.device.type == torch.ones(2, device=y.device).device.type != x.device.type
        assert numbers(y * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
        assert numbers(y[torch.tensor([1, 2])]).tolist() == [1, 2]
        assert numbers(x.to(y.device) + y).tolist() == [0, 2, 4, 6]
        assert numbers(torch.tensor([1.0, 2.0], device=y.device) * 2).tolist() == [2, 4]
        assert not device.waits
        for mistake in (lambda: x + y, lambda: torch.cat([x, y]), lambda: torch.stack([y[0], x[0]])):
            with pytest.raises(RuntimeError, match="same device"):
                mistake()


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.cpu(), "to cpu"),
        (lambda x: x.tolist(), "to cpu"),
        (lambda x: torch.zeros(3).copy_(x), "to cpu"),
    ],
)
def test_what_waits_for_the_device_is_counted(wait, name):
    x = to_other(torch.arange(3.0))
    with OtherDevice() as device:
        wait(x)
    assert device.waits[name] >= 1


def test_a_model_is_trained_there():
    case = CASES["residual"]
    model, other, (x, labels) = case.model().train(), move(case.model()).train(), case.inputs()
    F.cross_entropy(model(x), labels).backward()
    with OtherDevice():
        F.cross_entropy(other(to_other(x)), to_other(labels)).backward()
    assert_close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])


# -- calibration and scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(("name", "maker"), KINDS)
def test_scores_are_made_on_the_device_and_are_those_of_the_cpu(name, maker, scope):
    case, options = CASES[name], {"global_pruning": scope == "global"}
    imp, pruner = calibrated(case, MAKERS[maker], other=False, **options)
    wanted = [imp(group) for group in groups_of(pruner)]
    with OtherDevice():
        imp, pruner = calibrated(case, MAKERS[maker], other=True, **options)
        found = [imp(group) for group in groups_of(pruner)]
        if hasattr(imp, "report"):
            assert str(imp.report())
        pruner.step()
    assert all(isinstance(scores, Held) for scores in found)
    assert all(isinstance(p, Held) for p in pruner.model.parameters())
    assert_close(found, wanted)


@pytest.mark.parametrize("maker", MAKERS)
def test_batches_on_the_cpu_are_moved(maker):
    case = CASES["concat"]
    imp, pruner = calibrated(case, MAKERS[maker], other=False)
    wanted = [imp(group) for group in groups_of(pruner)]
    _, batches = setting(case, None, other=False)
    with OtherDevice():
        imp, pruner = calibrated(case, MAKERS[maker], True, batches)
        assert_close([imp(group) for group in groups_of(pruner)], wanted)


@pytest.mark.parametrize("loss", [FisherNoise, LogitNoise])
def test_losses_that_draw_noise(loss):
    case, found = CASES["residual"], []
    for other in (False, True):
        with OtherDevice():
            imp = PROImportance()
            pruner, batches = setting(case, imp, other)
            imp.calibrate(pruner, batches, loss(), progress=False)
            found.append([imp(group) for group in groups_of(pruner)])
    assert_close(found[1], found[0])


class Sometimes(nn.Module):
    """A branch that runs while the graph is traced, and not in the calibration."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 8)
        self.fc = nn.Linear(8, 3)
        self.with_branch = True

    def forward(self, x):
        y = self.a(x).relu()
        if self.with_branch:
            y = y + self.c(self.b(x).relu())
        return self.fc(y)


def flat(record, model):
    """A cost for groups that no forward pass has called."""
    return 1.0


UNCALLED = {
    "expected": lambda: PROImportance(cost=flat),
    "log": lambda: PROImportance(cost=flat, depletion="log", power=2),
    "coupled": lambda: PROImportance(cost=None, depletion="coupled"),
    "compensated": MAKERS["compensated"],
    "normalised": lambda: PROImportance(cost=None, depletion=None, normalizer="mean"),
    "single": lambda: PROImportance(group_reduction="mean", cost=None),
    "mean": lambda: PROImportance(reference="mean", cost=flat),
    "default": PROImportance,
    "paper": MAKERS["paper"],
    "spasp": SpaSPImportance,
    "spasp gated": MAKERS["spasp gated"],
}


def uncalled(make, other, **options):
    torch.manual_seed(0)
    model, x, labels = Sometimes().double(), torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
    model, x, labels = (move(model), to_other(x), to_other(labels)) if other else (model, x, labels)
    imp = make()
    pruner = make_pruner(model, x[:1], imp, [model.fc], **options)
    model.with_branch = False
    imp.calibrate(pruner, [(x, labels)], F.cross_entropy, progress=False)
    return imp, pruner


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("maker", UNCALLED)
def test_a_group_that_was_never_called_scores_on_the_device_of_its_layers(maker, scope):
    options = {"global_pruning": scope == "global"}
    imp, pruner = uncalled(UNCALLED[maker], other=False, **options)
    wanted = [imp(group) for group in groups_of(pruner)]
    with OtherDevice():
        imp, pruner = uncalled(UNCALLED[maker], other=True, **options)
        found = [imp(group) for group in groups_of(pruner)]
        # i-SpaSP scores a layer by the one that reads it: there is no score where that was not called.
        assert [scores is None for scores in found] == [scores is None for scores in wanted]
        assert all(isinstance(scores, Held) for scores in found if scores is not None)
        assert_close([scores for scores in found if scores is not None], [w for w in wanted if w is not None])
        if hasattr(imp, "report"):
            assert str(imp.report())
        pruner.step()


# -- moving statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("to_device", [False, True], ids=["to the CPU", "to the device"])
@pytest.mark.parametrize("maker", ["expected", "single", "paper", "spasp"])
def test_statistics_of_one_device_are_loaded_on_the_other(maker, to_device, scope):
    if maker == "spasp" and scope == "local":
        pytest.skip("a state does not hold how many channels the pruner keeps, which decides its scores")
    case, options = CASES["residual"], {"global_pruning": scope == "global"}
    with OtherDevice():
        imp, pruner = calibrated(case, MAKERS[maker], other=not to_device, **options)
        wanted = [imp(group) for group in groups_of(pruner)]
        state, other = imp.state_dict(), MAKERS[maker]()
        assert not any(isinstance(value, Held) for value in state["sums"].values())
        pruner, _ = setting(case, other, to_device, **options)
        other.load_state_dict(state)
        found = [other(group) for group in groups_of(pruner)]
        assert all(isinstance(scores, Held) == to_device for scores in found)
        assert_close(found, wanted)
        pruner.step()


@pytest.mark.parametrize("maker", ["expected", "single", "paper", "spasp"])
def test_statistics_of_two_devices_are_merged(maker):
    case = CASES["residual"]
    with OtherDevice():
        for first in (False, True):
            imp, pruner = calibrated(case, MAKERS[maker], other=first)
            imp.merge(calibrated(case, MAKERS[maker], other=not first)[0])
            assert all(isinstance(imp(group), Held) == first for group in groups_of(pruner))


# -- Compensation ------------------------------------------------------------------------------------------------


def distinct(model):
    """Weights without ties: rounding must not decide which channel goes."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.dim() > 1):
            p.mul_(torch.linspace(1 + i / 10, 2, p.shape[0], dtype=p.dtype).view(-1, *[1] * (p.dim() - 1)))
    return model


def magnitude_pruner(case, other):
    model, x = distinct(case.model()), case.inputs(1)[0]
    model, x = (move(model), to_other(x)) if other else (model, x)
    ignored = [model.get_submodule(n) for n in case.ignored]
    return make_pruner(model, x, tp.importance.GroupMagnitudeImportance(), ignored)


def compensated(comp, case, other):
    pruner = magnitude_pruner(case, other)
    report = comp.step(pruner)
    assert report.rows
    assert report.reverted or not any(row.skipped for row in report.rows), str(report)
    assert all(isinstance(p, Held) == other for p in pruner.model.parameters())
    return list(pruner.model.parameters())


@pytest.mark.parametrize("ridge", [None, 1e-3])
@pytest.mark.parametrize("name", NAMES)
def test_compensated_weights_are_those_of_the_cpu(name, ridge):
    case, weights = CASES[name], []
    data = list(case.inputs(48)[0].split(16))
    for other in (False, True):
        with OtherDevice():
            comp = Compensation(ridge).calibrate(magnitude_pruner(case, other), data, progress=False)
            weights.append(compensated(comp, case, other))
    assert_close(weights[1], weights[0], 1e-6)


@pytest.mark.parametrize(
    ("how", "to_device"),
    [(how, to_device) for how in ("loaded", "the same object") for to_device in (False, True)],
)
def test_samples_of_one_device_compensate_a_model_on_the_other(how, to_device):
    case = CASES["residual"]
    data = list(case.inputs(48)[0].split(16))
    with OtherDevice():
        comp = Compensation().calibrate(magnitude_pruner(case, not to_device), data, progress=False)
        if how == "loaded":
            state, comp = comp.state_dict(), Compensation()
            comp.load_state_dict(state)
        found = compensated(comp, case, to_device)
        comp = Compensation().calibrate(magnitude_pruner(case, to_device), data, progress=False)
        assert_close(found, compensated(comp, case, to_device), 1e-6)


@pytest.mark.parametrize("first", [False, True], ids=["CPU first", "device first"])
def test_samples_of_two_devices_are_merged(first):
    case = CASES["residual"]
    data = list(case.inputs(24)[0].split(8))
    with OtherDevice():
        comp, other = (
            Compensation().calibrate(magnitude_pruner(case, where), data, progress=False)
            for where in (first, not first)
        )
        comp.merge(other)
        compensated(comp, case, first)


def test_a_vit_with_heads_is_calibrated_pruned_and_compensated():
    timm = pytest.importorskip("timm")
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    for other in (False, True):
        torch.manual_seed(0)
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        net, images = (move(net), to_other(x)) if other else (net, x)
        with OtherDevice():
            imp = PROImportance()
            heads = attention_heads(net)
            pruner = make_pruner(net, images[:1], imp, [net.head], num_heads=heads, global_pruning=True)
            imp.calibrate(pruner, images.split(8), progress=False)
            Compensation(ridge=1e-2).calibrate(pruner, images.split(8), progress=False).step(pruner)
            update_attention(pruner)
            outputs.append(net(images))
    assert_close(outputs[1:], outputs[:1], 1e-3)


# -- waiting -----------------------------------------------------------------------------------------------------


def waits_per_batch(make, case, loss):
    """What waited for the device in the forward and backward pass of each batch."""
    with OtherDevice() as device:
        imp = make()
        pruner, batches = setting(case, imp, other=True, global_pruning=True)
        waits = []
        with imp.observe(pruner):
            for x, labels in [*batches, *batches]:
                before = Counter(device.waits)
                value = loss(pruner.model(x), labels)
                if imp.needs_gradients:
                    value.backward()
                waits.append(device.waits - before)
    return waits


@pytest.mark.parametrize(("name", "maker"), FEW)
def test_no_batch_after_the_second_waits_for_the_device(name, maker):
    waits = waits_per_batch(MAKERS[maker], CASES[name], F.cross_entropy)
    assert len(waits) == 8
    assert waits[2:] == [Counter()] * 6


@pytest.mark.parametrize("loss", [FisherNoise, LogitNoise])
def test_no_loss_waits_for_the_device(loss):
    waits = waits_per_batch(PROImportance, CASES["residual"], loss())
    assert waits[2:] == [Counter()] * 6


def test_no_kept_sample_waits_for_the_device():
    case = CASES["residual"]
    with OtherDevice() as device:
        pruner, batches = setting(case, None, other=True)
        comp = Compensation(max_samples=8)
        with comp.observe(pruner):
            for i, (x, _) in enumerate([*batches, *batches]):
                if i == 2:
                    device.waits.clear()
                pruner.model(x)
            assert not device.waits


@pytest.mark.parametrize("maker", MAKERS)
def test_the_end_of_a_calibration_waits_for_the_device_a_few_times(maker):
    """That sums are finite, and not all zero, is asked once for all of them."""
    case = CASES["residual"]
    with OtherDevice() as device:
        imp = MAKERS[maker]()
        pruner, batches = setting(case, imp, other=True)
        with imp.observe(pruner):
            for x, labels in batches:
                value = F.cross_entropy(pruner.model(x), labels)
                if imp.needs_gradients:
                    value.backward()
            device.waits.clear()
        assert device.waits.total() <= 3


@pytest.mark.parametrize(
    ("name", "maker", "scope"),
    failing(
        [(name, maker, scope) for name, maker in FEW for scope in ("local", "global")],
        "i-SpaSP goes on until its choice no longer changes, which the device has to say",
        lambda name, maker, scope: maker.startswith("spasp"),
    ),
)
def test_scoring_waits_for_the_device_at_most_once_a_group(name, maker, scope):
    with OtherDevice() as device:
        imp, pruner = calibrated(CASES[name], MAKERS[maker], other=True, global_pruning=scope == "global")
        groups = groups_of(pruner)
        device.waits.clear()
        for group in groups:
            imp(group)
        assert device.waits.total() <= len(groups)
