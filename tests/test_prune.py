"""prune(): targets, any importance, any kind of model, and that the model given stays as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import ippro_tp
from ippro_tp import (
    Compensation,
    NotCalibratedError,
    PROImportance,
    Recovery,
    SpaSPImportance,
    StructureError,
    TargetError,
    load_pruned,
    prune,
)
from ippro_tp.pruning.counter import count


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = block(3, 16), block(16, 32), block(32, 16)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.out(self.d(torch.cat((a, self.up(self.b(F.max_pool2d(a, 2)))), 1)))


class Detector(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.p3, self.p4 = block(3, width), block(width, width), block(width, width, 2)
        self.h3, self.h4 = nn.Conv2d(width, 12, 1), nn.Conv2d(width, 12, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        stem = self.stem(x)
        return [self.h3(self.p3(stem)), self.h4(self.p4(stem))]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        block(3, 32), block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def go(model: nn.Module, loader, example=None, **options):
    example = loader[0][:1] if example is None else example
    return prune(model, example, loader, progress=False, **options)


def widths(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


# -- kinds of models: five lines each -------------------------------------------------------------------------


def test_torchvision_resnet(images):
    model = torchvision.models.resnet18(num_classes=10)
    result = prune(model, images[:1], [images], macs=0.5, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert set(result.left_whole) == {"fc.out"}
    assert result.model(images).shape == (16, 10)


def test_timm_vit(images):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=16, patch_size=4, num_classes=10)
    result = prune(model, images[:1], [images], macs=0.5, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    heads, size = result.model.blocks[0].attn.num_heads, result.model.blocks[0].attn.head_dim
    assert result.model.blocks[0].attn.qkv.out_features == 3 * heads * size
    assert result.model(images).shape == (16, 10)


def test_torchvision_vit_with_multihead_attention(images):
    model = torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    result = prune(model, images[:1], [images], params=0.7, progress=False)
    assert result.params == pytest.approx(0.7, abs=0.01)
    assert result.model(images).shape == (16, 10)


def test_hugging_face_bert():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install ippro-tp[dev]")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(0, 50, (16, 7)), "attention_mask": torch.ones(16, 7, dtype=torch.long)}
    result = prune(model, {k: v[:1] for k, v in batch.items()}, [batch], macs=0.5, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert result.model(**batch).logits.shape == (16, 3)


def test_unet(images):
    result = prune(UNet(), images[:1], [images], macs=0.5, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert result.model(images).shape == (16, 4, 16, 16)


def test_two_output_detector(images):
    result = prune(Detector(), images[:1], [images], macs=0.5, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert set(result.left_whole) == {"h3.out", "h4.out"}
    assert [out.shape[1] for out in result.model(images)] == [12, 12]


# -- targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("target", [{"macs": 0.3}, {"params": 0.7}])
def test_sizes_are_measured_and_met(images, scope, target):
    model = small()
    result = go(model, [images], scope=scope, **target)
    before, after = count(model, images[:1]), count(result.model, images[:1])
    assert result.macs == after.macs / before.macs
    assert result.params == after.params / before.params
    assert result.latency is None
    ((unit, wanted),) = target.items()
    assert getattr(result, unit) == pytest.approx(wanted, abs=0.01)


def test_ratio_is_the_fraction_of_channels_that_goes(images):
    result = go(small(), [images], ratio=0.5, scope="local")
    assert [g.after for g in result.groups if not g.reason] == [16, 32]


def test_steps_add_up_and_the_ratio_holds_over_all(images):
    result = go(small(), [images], macs=0.3, steps=3, max_pruning_ratio=0.6)
    assert result.macs == pytest.approx(0.3, abs=0.01)
    assert len(result.steps) == 3
    assert all(g.after >= 0.4 * g.before for g in result.groups)


def test_widths_are_multiples(images):
    result = go(small(), [images], macs=0.5, round_to=4)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert all(g.after % 4 == 0 for g in result.groups if not g.reason)


def test_what_cannot_be_met_is_refused_with_the_nearest(images):
    with pytest.raises(TargetError, match=r"nearest is 0\.") as caught:
        go(small(), [images], macs=0.1, max_pruning_ratio=0.5)
    nearest = caught.value.nearest
    assert nearest > 0.11
    assert go(small(), [images], macs=nearest, max_pruning_ratio=0.5).macs == pytest.approx(nearest, abs=0.01)


def test_dead_groups_are_pruned_too_and_ties_do_not_over_prune():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 32) for _ in range(3))
            self.f = nn.Linear(96, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(F.relu(torch.cat((self.a(x), self.b(x), self.c(x)), 1)))

    model, x = Branches(), torch.randn(64, 8)
    with torch.no_grad():
        model.a.bias.fill_(-99)
        model.b.bias[:16] = -99
    result = go(model, [x], ratio=0.4)
    assert result.model.a.out_features < 16
    assert result.model.c.out_features == 32
    assert go(model, [x], ratio=0.6).model.a.out_features == 4  # all are dead: as far as max_pruning_ratio lets it
    assert sum(g.after for g in result.groups if not g.reason) == pytest.approx(0.6 * 96, abs=1)


# -- importances, compensation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "importance",
    [
        tp.importance.MagnitudeImportance(p=1),
        tp.importance.RandomImportance(),
        tp.importance.TaylorImportance(),
        tp.importance.HessianImportance(),
        SpaSPImportance(),
        PROImportance(estimator="paper"),
    ],
    ids=lambda importance: type(importance).__name__,
)
def test_any_importance(images, importance):
    before = dict(vars(importance))
    labelled = [(images, torch.arange(16) % 5)]
    result = prune(small(), images[:1], labelled, macs=0.5, importance=importance, progress=False)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert result.importance == type(importance).__name__
    assert vars(importance) == before


def test_gradients_are_those_of_the_loss(images):
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return outputs.square().mean()

    batches = [(images, torch.zeros(16, 3))]
    go(small(), batches, images[:1], macs=0.5, importance=tp.importance.TaylorImportance(), loss_fn=loss)
    assert len(seen) == 1
    go(small(), batches, images[:1], macs=0.5, importance=tp.importance.TaylorImportance())  # no class numbers


def test_compensation_can_be_left_out_and_chosen(images):
    plain = go(small(), [images], macs=0.5, importance=PROImportance(compensated=True), compensation=False)
    default = go(small(), [images], macs=0.5)
    chosen = go(small(), [images], macs=0.5, compensation=Compensation(ridge=0.1))
    assert widths(plain.model) == widths(default.model)
    assert not same(plain.model, default.model)
    assert not same(chosen.model, default.model)
    assert plain.steps[0].refitted is None
    assert default.steps[0].refitted.rows


# -- what stays as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_recovery_comes_nearer_to_the_unpruned_model(images, named):
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward_fn = (lambda net, x: net(x["images"])) if named else None
    example, batches = images[:1], images.split(8)
    if named:
        example, batches = {"images": example}, [{"images": x} for x in batches]
    how = Recovery(steps=20, batch_size=8)
    random = tp.importance.RandomImportance()  # leaves something to recover
    options = {"macs": 0.5, "forward_fn": forward_fn, "importance": random, "progress": False}
    plain = prune(model, example, batches, **options)
    result = prune(model, example, batches, recover=how, **options)
    assert plain.recovered is None
    assert result.recovered.after < result.recovered.before
    assert result.recovered.held_out > 0
    assert "recovered: distance" in str(result)
    assert result.macs == plain.macs
    with pytest.raises(NotCalibratedError):  # the one that was given is as it was
        how.run(result.model, model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_and_random_streams_stay_as_they_were(images):
    model = small().train()
    model[0].requires_grad_(False)
    model(images).sum().backward()
    twin, grads = copy.deepcopy(model), [p.grad for p in model.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = go(model, [images], macs=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, twin)
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in result.model.modules()]
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in result.model.parameters())


@pytest.mark.parametrize("fails_at", ["importance", "loader"])
def test_the_model_stays_as_it_was_after_an_exception(images, fails_at):
    def importance(group):
        raise ZeroDivisionError

    def loader():
        yield images
        raise ZeroDivisionError

    model = small().train()
    twin = copy.deepcopy(model)
    options = {"importance": importance} if fails_at == "importance" else {}
    with pytest.raises(ZeroDivisionError):
        prune(
            model, images[:1], loader() if fails_at == "loader" else [images], macs=0.5, progress=False, **options
        )
    assert same(model, twin)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_seed_decides(images):
    options = {"macs": 0.5, "importance": tp.importance.RandomImportance()}
    first, second, other = (go(small(), [images], seed=seed, **options).model for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other) if widths(first) == widths(other) else True
    iterator = prune(small(), images[:1], iter([images]), macs=0.5, progress=False)
    assert same(iterator.model, go(small(), [images], macs=0.5).model)


# -- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_name", [False, True])
def test_ignored_layers_keep_their_outputs(images, as_name):
    model = small()
    result = go(model, [images], params=0.7, ignored_layers=["0" if as_name else model[0]])
    assert result.model[0][0].out_channels == 32
    assert result.left_whole["0.0.out"] == "named in ignored_layers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one target"),
        ({"macs": 0.5, "params": 0.5}, "exactly one target"),
        ({"macs": 1.5}, "between 0 and 1"),
        ({"macs": 0.5, "scope": "layer"}, "scope"),
        ({"macs": 0.5, "steps": 0}, "steps"),
        ({"macs": 0.5, "round_to": -8}, "round_to"),
        ({"macs": 0.5, "max_pruning_ratio": 0}, "max_pruning_ratio"),
        ({"macs": 0.5, "ignored_layers": [nn.Linear(1, 1)]}, "not a module of the model"),
    ],
)
def test_bad_arguments(images, options, message):
    with pytest.raises(ValueError, match=message):
        go(small(), [images], **options)


def test_forward_fn_and_output_transform(images):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor, scale: float) -> tuple[str, Tensor]:
            return "scores", self.net(x) * scale

    result = go(
        Odd(),
        [images],
        macs=0.5,
        forward_fn=lambda model, x: model(x, 2.0),
        output_transform=lambda out: out[1],
        steps=2,
    )
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert result.model(images, 1.0)[1].shape == (16, 5)


def test_a_model_that_does_not_run_is_named(images):
    with pytest.raises(StructureError, match="example inputs"):
        go(small(), [images], images[:1, :2], macs=0.5)


# -- shown -----------------------------------------------------------------------------------------------------


def test_the_result_prints_and_is_html(images):
    result = go(small(), [images], macs=0.5)
    text, page = str(result), result._repr_html_()
    for part in ("0.0.out", "4.out: its channels are the model's output", "refitted: ", f"({result.macs:.1%})"):
        assert part in text
    assert page.startswith("<p>")
    assert "<td>0.0.out</td>" in page
    assert "model&#x27;s output" in page


# -- saved -----------------------------------------------------------------------------------------------------

LOADS = """
import sys, torch
from ippro_tp import load_pruned
model, saved = load_pruned(sys.argv[1]), torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    out = model(**saved["x"]) if isinstance(saved["x"], dict) else model(saved["x"])
    out = getattr(out, "logits", out)
    assert torch.equal(out, saved["y"]), (out - saved["y"]).abs().max()
assert "tests" not in sys.modules
"""


def test_results_come_back_in_another_process(images, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install ippro-tp[dev]")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    ids = torch.randint(0, 50, (16, 7))
    nets = {
        "tv": (torchvision.models.resnet18(num_classes=10), images),
        "timm": (
            timm.create_model("vit_tiny_patch16_224", depth=1, img_size=16, patch_size=4, num_classes=3),
            images,
        ),
        "hf": (transformers.BertForSequenceClassification(config), {"input_ids": ids}),
        "plain": (small(), images),
    }
    for name, (model, x) in nets.items():
        example = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
        result = prune(model.eval(), example, [x], macs=0.6, progress=False, compensation=False)
        folder = result.save(tmp_path / name)
        with torch.no_grad():
            y = result.model(**x) if isinstance(x, dict) else result.model(x)
        torch.save({"x": x, "y": getattr(y, "logits", y)}, folder / "expected.pt")
    code = f"import sys\nLOADS = {LOADS!r}\nfor folder in sys.argv[2:]:\n    sys.argv[1] = folder\n    exec(LOADS)"
    folders = [str(tmp_path / name) for name in nets]
    root = Path(ippro_tp.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, "", *folders],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_saving_says_what_it_needs(tmp_path):
    class Local(nn.Sequential):
        pass

    model, x = Local(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(8, 4)
    result = go(model, [x], macs=0.5)
    with pytest.raises(ValueError, match="pass builder="):
        result.save(tmp_path / "out")
    build = lambda: Local(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))  # noqa: E731
    again = load_pruned(result.save(tmp_path / "out", builder=build), builder=build)
    assert torch.equal(again(x), result.model(x))


class Scaled(nn.Sequential):
    """Multiplies by what stands neither on it nor on its modules."""

    factors: ClassVar[weakref.WeakKeyDictionary[nn.Module, float]] = weakref.WeakKeyDictionary()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors.get(self, 1.0)


def test_a_model_that_comes_back_as_another_is_not_saved(tmp_path):
    x = torch.randn(8, 4)
    result = go(Scaled(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), [x], macs=0.5)
    Scaled.factors[result.model] = 2.0
    with pytest.raises(ValueError, match="gives other outputs"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- scores of any importance, made comparable -----------------------------------------------------------------


def test_pricing_divides_by_cost_and_raises_what_is_left(images):
    from ippro_tp.pruning.pricing import Pricing
    from ippro_tp.pruning.structure import read_structure

    model = small()
    structure = read_structure(model, images[:1])
    scores = {key: torch.rand(p.record.width).double() for key, p in structure.groups.items()}
    plain = Pricing(None, False, 1).apply(scores, structure, images[:1])
    assert all(torch.allclose(plain[key].double(), values) for key, values in scores.items())
    counts = count(model, images[:1]).by_layer
    first, second = "0.0.out", "1.0.out"  # a channel of the first is also an input of the second convolution
    work = {first: (counts["0.0"] + counts["1.0"]) / 32, second: (counts["1.0"] + counts["4"]) / 64}
    priced = Pricing("macs", False, 2).apply(scores, structure, images[:1])
    ratio = (scores[first][0] / priced[first][0]) / (scores[second][0] / priced[second][0])
    assert float(ratio) == pytest.approx(work[first] / work[second], rel=1e-5)
    depleted = Pricing(None, True, 1).apply(scores, structure, images[:1])
    assert all(bool((depleted[key] >= plain[key]).all()) for key in scores)
    assert all(torch.equal(depleted[key].argsort(), plain[key].argsort()) for key in scores)


class C2f(nn.Module):
    """As in YOLOv8: halves of a layer's channels go different ways and meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2, self.f = nn.Conv2d(3, 32, 1), nn.Conv2d(64, 24, 1), nn.Linear(24, 5)
        self.m = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for layer in self.m:
            parts.append(parts[-1] + torch.relu(layer(parts[-1])))
        return self.f(torch.relu(self.cv2(torch.cat(parts, 1))).mean((2, 3)))


def test_chunks_that_torch_pruning_maps_wrongly(images):
    result = go(C2f(), [images], macs=0.5)
    assert result.macs == pytest.approx(0.5, abs=0.01)
    assert set(result.left_whole) == {"f.out"}
    assert result.model.cv1.out_channels < 32
    assert result.model(images).shape == (16, 5)


def test_units_that_differ_in_size_meet_the_target(images):
    """As in MambaOut: some units pass through a convolution, and go first."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = (32, 20, 12)
            self.a, self.b = nn.Conv2d(3, 64, 1), nn.Conv2d(12, 12, 5, padding=2, groups=12)
            self.c, self.f = nn.Conv2d(32, 8, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            gate, one, other = self.a(x).split(self.parts, 1)
            return self.f(torch.relu(self.c(gate * torch.cat((one, self.b(other)), 1))).mean((2, 3)))

    class LastFirst(tp.importance.Importance):
        def __call__(self, group) -> Tensor:
            return torch.arange(float(len(group[0].idxs)), 0, -1)

    result = go(Gated(), [images], macs=0.7, importance=LastFirst(), compensation=False)
    assert "a.out" not in result.left_whole
    assert result.macs == pytest.approx(0.7, abs=0.01)


def test_what_a_forward_pass_caches_is_no_hindrance(images):
    model = timm.create_model("levit_128s", num_classes=3).eval()
    x = torch.randn(2, 3, 224, 224)
    caches = [dict(m.attention_bias_cache) for m in model.modules() if hasattr(m, "attention_bias_cache")]
    result = go(model, [x], macs=0.8, compensation=False)
    copy.deepcopy(result.model)
    assert not any(caches)
    assert not any(m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache"))
    assert result.model(x).shape == (2, 3)


class Standardised(nn.Linear):
    """Normalises its weights over the inputs, and cannot where there is one input."""

    def forward(self, x):
        weight = F.batch_norm(self.weight[None], None, None, training=True)[0]
        return F.linear(x, weight, self.bias)


class Picky(nn.Module):
    """Its own forward pass refuses some widths of an inner layer."""

    def __init__(self, least=1, multiple=1, width=48):
        super().__init__()
        self.least, self.multiple = least, multiple
        self.first, self.other, self.head = nn.Linear(4, width), nn.Linear(width, 40), nn.Linear(40, 2)

    def forward(self, x):
        x = self.first(x).relu()
        if x.shape[-1] < self.least:
            raise ValueError(f"fewer than {self.least}")
        if x.shape[-1] % self.multiple:
            raise ValueError(f"no multiple of {self.multiple}")
        return self.head(self.other(x).relu())


@pytest.mark.parametrize("target", [{"macs": 0.3}, {"params": 0.3}, {"ratio": 0.7}], ids=lambda t: next(iter(t)))
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_model_that_refuses_narrow_layers_keeps_more_of_them(target, scope):
    torch.manual_seed(0)
    model, x = Picky(least=20), torch.randn(16, 4)
    result = prune(model, x[:1], [x], scope=scope, progress=False, **target)
    assert result.model.first.out_features >= 20
    assert result.model(x).shape == (16, 2)
    if "macs" in target:
        assert result.macs == pytest.approx(0.3, abs=0.0101)


@pytest.mark.parametrize(("multiple", "width"), [(4, 48), (6, 48), (7, 49)])
def test_a_model_that_refuses_all_but_multiples_gets_them(multiple, width):
    torch.manual_seed(0)
    model, x = Picky(multiple=multiple, width=width), torch.randn(16, 4)
    result = prune(model, x[:1], [x], macs=0.5, scope="local", progress=False)
    assert result.model.first.out_features % multiple == 0
    assert result.model.first.out_features < width
    assert result.macs == pytest.approx(0.5, abs=0.0101)
    assert result.model(x).shape == (16, 2)


def test_a_layer_that_does_not_run_at_its_narrowest_keeps_more():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Standardised(6, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    x = torch.randn(16, 4)
    result = prune(model, x[:1], [x], macs=0.15, max_pruning_ratio=1.0, progress=False)
    assert result.model[2].in_features >= 2
    assert result.model(x).shape == (16, 2)
