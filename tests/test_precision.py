"""Mixed precision, memory layouts, checkpointing and compilation: the same scores, or a clear refusal."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ippro_tp import Compensation, ObservationError, PROImportance, SpaSPImportance
from ippro_tp.estimators.sums import Sums
from ippro_tp.graph.groups import groups_of

from .nets import CASES, make_pruner

PRO = {"expected": {}, "squares": {"power": 2}, "paper": {"estimator": "paper", "step_size": 0.5}}
MAKERS = {
    "expected": PROImportance,
    "paper": lambda: PROImportance("paper"),
    "spasp": SpaSPImportance,
    "spasp gated": lambda: SpaSPImportance(signed="gated"),
    "compensation": lambda: Compensation(max_samples=8),
}
NAMES = ["residual", "depthwise", "concat", "transformer"]


def scores_of(imp, pruner):
    return [imp(group) for group in groups_of(pruner)]


def observed(
    case, model, settings, context=nullcontext, scale=lambda step: 1.0, steps=2, dtype=torch.float32, **options
):
    """Scores after ``steps`` batches of four; ``scale(step)`` multiplies the loss."""
    imp = PROImportance(**settings)
    pruner = case.pruner(model, imp)
    x, labels = case.inputs(8, dtype)
    with imp.observe(pruner, **options):
        for step in range(2):
            part = slice(4 * step, 4 * step + 4)
            with context():
                loss = F.cross_entropy(model(x[part]), labels[part])
            (loss * scale(step)).backward()
    return imp, scores_of(imp, pruner)


def assert_close(a, b, rtol=1e-4):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def correlation(a, b):
    a, b = (torch.cat([s / s.abs().mean() for s in scores]) for scores in (a, b))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# -- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", PRO)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_scores_of_float32_but_for_its_rounding(name, settings, dtype):
    case = CASES[name]
    model = case.model(torch.float32)
    _, plain = observed(case, model, PRO[settings])
    imp, scores = observed(case, model, PRO[settings], lambda: torch.autocast("cpu", dtype=dtype))
    assert correlation(scores, plain) > (0.98 if dtype == torch.bfloat16 else 0.999)
    assert not all(map(torch.equal, scores, plain))  # low precision was in use
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in scores)
    assert {v.dtype for v in imp._sums.values()} <= {torch.float32, torch.float64}


def test_calibrate_may_run_under_autocast():
    case = CASES["residual"]
    model = case.model(torch.float32)
    pruner = case.pruner(model, None)
    data = [case.inputs(6, torch.float32)]
    for make in (PROImportance, SpaSPImportance):
        plain = scores_of(make().calibrate(pruner, data, progress=False), pruner)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = scores_of(make().calibrate(pruner, data, progress=False), pruner)
        assert correlation(scores, plain) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_is_scored_in_float32_and_pruned(dtype):
    case = CASES["residual"]
    half = case.model(dtype)
    same = case.model(dtype).float()
    for settings in PRO.values():
        imp, scores = observed(case, half, settings, dtype=dtype)
        _, plain = observed(case, same, settings)
        assert correlation(scores, plain) > 0.98
        assert all(s.dtype == torch.float32 for s in scores)
        assert {v.dtype for v in imp._sums.values()} <= {torch.float32, torch.float64}
    pruner = case.pruner(half, imp)
    comp = Compensation()
    data = [case.inputs(16, dtype)]
    imp.calibrate(pruner, data, loss_fn=F.cross_entropy, progress=False)
    report = comp.calibrate(pruner, data, progress=False).step(pruner)
    assert report.rows
    assert not any(row.skipped for row in report.rows)
    assert half.stem.out_channels == 3
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert half(data[0][0]).isfinite().all()


def test_sums_are_kept_in_float32_or_wider():
    sums = Sums()
    for _ in range(3000):
        sums.add("x", torch.ones(1, dtype=torch.float16))
    assert sums["x"] == 3000  # 2048 in float16
    sums.add("y", torch.full((1,), 6e4, dtype=torch.float16))
    sums.add("y", torch.full((1,), 6e4, dtype=torch.float16))
    assert sums["y"].isfinite()


# -- loss scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", PRO)
def test_a_constant_loss_scale_changes_no_order_and_can_be_taken_out(settings):
    case = CASES["residual"]
    model = case.model(torch.float32)
    _, plain = observed(case, model, PRO[settings])
    _, scaled = observed(case, model, PRO[settings], scale=lambda _: 1024.0)
    if settings != "paper":  # there it is a larger step
        factor = 1024.0 ** PRO[settings].get("power", 1)
        assert_close([s / factor for s in scaled], plain, 1e-5)
        assert all(torch.equal(a.argsort(), b.argsort()) for a, b in zip(scaled, plain, strict=True))
    for option in (1024.0, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        _, taken_out = observed(case, model, PRO[settings], scale=lambda _: 1024.0, loss_scale=option)
        assert_close(taken_out, plain, 1e-5)


@pytest.mark.parametrize("settings", PRO)
def test_a_grad_scaler_may_change_its_mind(settings):
    case = CASES["residual"]
    model = case.model(torch.float32)
    _, plain = observed(case, model, PRO[settings])
    imp = PROImportance(**PRO[settings])
    pruner = case.pruner(model, imp)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, labels = case.inputs(8, torch.float32)
    with imp.observe(pruner, loss_scale=scaler):
        for part in (slice(0, 4), slice(4, 8)):
            scaler.scale(F.cross_entropy(model(x[part]), labels[part])).backward()
            scaler.update(64.0)
    assert_close(scores_of(imp, pruner), plain, 1e-5)


@pytest.mark.parametrize("settings", PRO)
def test_a_float16_loop_with_a_grad_scaler(settings):
    """Small losses vanish in float16 without a scale; with it the scores are those of float32."""
    case = CASES["residual"]
    model = case.model(torch.float32)
    tiny = 2.0**-22

    def half():
        return torch.autocast("cpu", dtype=torch.float16)

    _, plain = observed(case, model, PRO[settings], scale=lambda _: tiny)
    with pytest.raises(ObservationError, match=r"exactly zero(?s:.*)GradScaler"):
        observed(case, model, PRO[settings], half, scale=lambda _: tiny)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    _, scaled = observed(
        case, model, PRO[settings], half, scale=lambda _: tiny * scaler.get_scale(), loss_scale=scaler
    )
    assert correlation(scaled, plain) > 0.999
    assert_close(scaled, plain, 0.02)


@pytest.mark.parametrize("settings", PRO)
def test_batches_that_overflow_are_left_out(settings):
    case = CASES["residual"]
    model = case.model(torch.float32)
    x, labels = case.inputs(12, torch.float32)
    data = list(zip(x.split(4), labels.split(4), strict=True))
    imp = PROImportance(**PRO[settings])
    pruner = case.pruner(model, imp)

    def run(overflowing, batches, **options):
        with imp.observe(pruner, **options):
            for i, (images, y) in enumerate(batches):
                out = model(images)
                if i in overflowing:
                    out.register_hook(lambda g: g * float("inf"))
                (F.cross_entropy(out, y) * 512.0).backward()
        return scores_of(imp, pruner)

    expected = run((), [data[0], data[2]], loss_scale=512.0)
    with pytest.warns(RuntimeWarning, match="1 of 3 batches were left out"):
        assert_close(run((1,), data, loss_scale=512.0), expected, 1e-6)
    with pytest.raises(ObservationError, match="all 3 batches overflow: lower the loss scale"):
        run((0, 1, 2), data, loss_scale=512.0)
    with pytest.raises(ObservationError, match=r"NaN or inf.*loss_scale=scaler"):
        run((1,), data)
    assert_close(scores_of(imp, pruner), expected, 1e-6)  # an error leaves what there was
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run((), data, loss_scale=512.0)


def test_a_loss_scale_must_be_positive():
    case = CASES["residual"]
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "dynamic"):
        with pytest.raises(ValueError, match=r"loss_scale=.*positive number or a torch\.amp\.GradScaler"):
            observed(case, case.model(torch.float32), {}, loss_scale=wrong)


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_channels_last_gives_equal_scores(name):
    case = CASES[name]
    model = case.model(torch.float32)
    x, labels = case.inputs(6, torch.float32)
    pruner = case.pruner(model, None)
    for make in (
        PROImportance,
        lambda: PROImportance("paper"),
        SpaSPImportance,
        lambda: SpaSPImportance(signed="abs"),
    ):
        model.to(memory_format=torch.contiguous_format)
        plain = scores_of(make().calibrate(pruner, [(x, labels)], F.cross_entropy, progress=False), pruner)
        model.to(memory_format=torch.channels_last)
        last = x.to(memory_format=torch.channels_last)
        imp = make().calibrate(pruner, [(last, labels)], F.cross_entropy, progress=False)
        assert_close(scores_of(imp, pruner), plain)


@pytest.mark.parametrize(
    ("name", "scaled"), [*((name, False) for name in MAKERS), ("expected", True), ("paper", True)]
)
def test_memory_does_not_grow_with_the_number_of_batches(name, scaled):
    case = CASES["residual"]
    model = case.model(torch.float32)
    x, labels = case.inputs(4, torch.float32)
    imp = MAKERS[name]()
    pruner = case.pruner(model, imp)
    objects, traced = [], []
    with imp.observe(pruner, **({"loss_scale": 2.0} if scaled else {})):
        if name == "expected" and not scaled:  # it is slow
            tracemalloc.start()
        for step in range(25):
            loss = F.cross_entropy(model(x), labels)
            if imp.needs_gradients:
                loss.backward()
            del loss
            if step in (8, 24):
                gc.collect()
                objects.append(len(gc.get_objects()))
                traced.append(tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0)
        tracemalloc.stop()
    assert objects[1] - objects[0] < 16  # tensors and all else, after 16 batches more
    assert traced[1] - traced[0] < 16 * 4096  # Python's own free lists fill up; a batch's records are larger


# -- gradient checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two parts that may be recomputed in the backward pass: ``reentrant`` None is without."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.a = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 7, 3), nn.GELU())
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        for part in (self.a, self.b):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return self.fc(x.mean((2, 3)))


def checkpointed(reentrant, settings, at_construction=True, make=PROImportance):
    model = Checkpointed(reentrant if at_construction else None).eval()
    imp = make(**settings)
    pruner = make_pruner(model, CASES["residual"].inputs(1, torch.float32)[0], imp, [model.fc])
    model.reentrant = reentrant
    x, labels = CASES["residual"].inputs(7, torch.float32)
    imp.calibrate(pruner, zip(x.split(4), labels.split(4), strict=True), F.cross_entropy, progress=False)
    return imp, scores_of(imp, pruner)


@pytest.mark.parametrize("settings", PRO)
def test_checkpointing_counts_each_batch_once(settings):
    _, plain = checkpointed(None, PRO[settings])
    imp, scores = checkpointed(False, PRO[settings])
    assert_close(scores, plain, 1e-6)
    assert imp._sums.get("samples", 7) == 7


def test_checkpointing_counts_each_batch_once_in_forward_only_criteria():
    _, plain = checkpointed(None, {}, make=SpaSPImportance)
    for reentrant in (False, True):
        imp, scores = checkpointed(reentrant, {}, at_construction=False, make=SpaSPImportance)
        assert_close(scores, plain, 1e-6)
        assert imp._sums["samples"] == 7


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("settings", PRO)
def test_reentrant_checkpointing_is_refused_with_the_fix(settings):
    with pytest.raises(ObservationError, match="checkpointing, use use_reentrant=False"):
        checkpointed(True, PRO[settings], at_construction=False)
    with pytest.raises(ObservationError, match=r"cannot see through.*use_reentrant=True"):
        checkpointed(True, PRO[settings])


# -- compilation -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """A model, its pruner, and the compiled model."""
    torch._dynamo.reset()
    case = CASES["residual"]
    model = case.model(torch.float32)
    yield model, case.pruner(model, None), torch.compile(model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("warm", [False, True])
def test_calling_the_compiled_model_inside_observe_gives_the_same_sums(compiled, name, warm):
    model, pruner, fast = compiled
    x, labels = CASES["residual"].inputs(6, torch.float32)
    if warm:
        fast(x)
    results = []
    for call in (model, fast):
        imp = MAKERS[name]()
        with imp.observe(pruner):
            out = call(x)
            if imp.needs_gradients:
                F.cross_entropy(out, labels).backward()
        results.append({"x": imp._samples.arguments()[0][0]} if name == "compensation" else imp._sums)
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert torch.allclose(fast(x), model(x), atol=1e-6)  # and it goes on working


def test_a_compiled_model_is_refused_with_the_fix(compiled):
    model, pruner, fast = compiled
    data = [CASES["residual"].inputs(4, torch.float32)]
    for make in (PROImportance, SpaSPImportance, Compensation):
        with pytest.raises(ObservationError, match=r"torch\.compile.*_orig_mod"):
            make().calibrate(fast, data, progress=False)
        model.relu = torch.compile(model.relu, backend="eager")
        with pytest.raises(ObservationError, match=r"a part of it, is wrapped by torch\.compile"):
            make().calibrate(pruner, data, progress=False)
        model.relu = model.relu._orig_mod


def test_a_model_that_was_compiled_in_place_is_refused():
    case = CASES["residual"]
    model = case.model(torch.float32)
    pruner = case.pruner(model, None)
    model.compile(backend="eager")
    with pytest.raises(ObservationError, match=r"torch\.compile"):
        PROImportance().calibrate(pruner, [case.inputs(4, torch.float32)], progress=False)
