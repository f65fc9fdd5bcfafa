"""A pruned model comes back bit for bit, from two plain files, or the message says why not."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from torch import nn

from ippro_tp import Compensation, PROImportance, load_pruned, save_pruned
from ippro_tp.pruning import saving

from .nets import CASES, make_pruner


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}


def _prune(model: nn.Module, size: int, ratio: float = 0.4, **options) -> torch.Tensor:
    """Prune in place with random scores, mend timm's attention, randomise statistics; return two images."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    last = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    heads = _heads(model)
    pruner = make_pruner(
        model, x[:1], tp.importance.RandomImportance(), [last], pruning_ratio=ratio, num_heads=heads, **options
    )
    pruner.step()
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return x


NETS = {
    "torchvision resnet18": ("torchvision", "resnet18", {"num_classes": 10}, 32, {}),
    "torchvision mobilenet_v3_small": ("torchvision", "mobilenet_v3_small", {}, 64, {}),
    "torchvision densenet121": ("torchvision", "densenet121", {}, 32, {"ratio": 0.3}),
    "timm densenet121": ("timm", "densenet121", {"block_config": [2, 2, 2, 2]}, 32, {}),
    "timm convnext_atto": ("timm", "convnext_atto", {"num_classes": 10}, 64, {}),
    "timm vit_tiny": ("timm", "vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 64, {}),
    "timm vit_tiny, heads": (
        "timm", "vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 64,
        {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.34},
    ),
    "timm regnetx_002": ("timm", "regnetx_002", {}, 64, {}),
    "timm resnetv2_50": ("timm", "resnetv2_50", {"layers": [1, 1, 1, 1]}, 64, {}),
    "timm mobilenetv3_small_050": ("timm", "mobilenetv3_small_050", {}, 64, {}),
}  # fmt: skip


SLOW = ("torchvision densenet121",)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in NETS])
def test_outputs_are_the_same_to_the_bit(case, tmp_path):
    library, name, kwargs, size, options = NETS[case]
    source = {"library": library, "name": name, "kwargs": kwargs}
    model = saving._build(source, None).eval()
    before = sum(p.numel() for p in model.parameters())
    x = _prune(model, size, **options)
    assert sum(p.numel() for p in model.parameters()) < before
    random = torch.get_rng_state()
    again = load_pruned(save_pruned(model, tmp_path, source))
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert type(again) is type(model)
    assert str(again) == str(model)  # all widths that modules show


def test_grouped_convolutions_keep_their_groups(tmp_path):
    source = {"library": "timm", "name": "regnetx_002", "kwargs": {}}
    model = saving._build(source, None).eval()
    _prune(model, 64)
    loaded = dict(load_pruned(save_pruned(model, tmp_path, source)).named_modules())
    grouped = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert grouped
    assert all(loaded[n].groups == m.groups and loaded[n].in_channels == m.in_channels for n, m in grouped)


@pytest.mark.parametrize("name", CASES)
def test_own_networks_come_back_through_their_builder(name, tmp_path):
    case = CASES[name]
    model = case.model()
    pruner = case.pruner(model, PROImportance())
    loader = [case.inputs()]
    pruner.importance.calibrate(pruner, loader, progress=False)
    Compensation().calibrate(pruner, loader, progress=False).step(pruner)
    save_pruned(model, tmp_path, builder=case.build)
    again = load_pruned(tmp_path, builder=case.build)
    x, _ = case.inputs()
    assert next(again.parameters()).dtype == torch.float64
    assert torch.equal(model(x), again(x))


class _Odd(nn.Module):
    """Tied weights, a buffer outside the state dict, a bare parameter, a frozen layer, a removed bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("grid", torch.zeros(6), persistent=False)
        self.gap, self.sizes, self.ratio = 1, (3, 4), 0.5


def test_odd_states_are_kept(tmp_path):
    model = _Odd()
    model.embed.weight = model.head.weight = nn.Parameter(torch.randn(5, 4))
    model.embed.bias = None
    model.head.bias = nn.Parameter(torch.randn(5), requires_grad=False)
    model.scale = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    model.grid = torch.randn(5)
    model.gap, model.sizes, model.ratio = 7, (5, 4), 0.1
    model.train()
    model.head.eval()
    again = load_pruned(save_pruned(model, tmp_path, builder=_Odd), builder=_Odd)
    assert again.embed.weight is again.head.weight
    assert again.embed.bias is None
    assert not again.head.bias.requires_grad
    assert again.scale.dtype == torch.bfloat16
    assert torch.equal(again.scale, model.scale)
    assert torch.equal(again.grid, model.grid)
    assert (again.gap, again.sizes, again.ratio) == (7, (5, 4), 0.1)
    assert again.training
    assert again.embed.training
    assert not again.head.training


def test_weights_tied_by_the_builder_may_be_untied(tmp_path):
    model = _Odd()
    model.head.weight = nn.Parameter(torch.randn(6, 4))
    again = load_pruned(save_pruned(model, tmp_path, builder=_Odd), builder=_Odd)
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_channels_last_and_a_default_dtype_survive(tmp_path):
    source = {"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 3}}
    model = saving._build(source, None).eval().to(memory_format=torch.channels_last)
    x = _prune(model, 32)
    save_pruned(model, tmp_path, source)
    torch.set_default_dtype(torch.float64)
    try:
        again = load_pruned(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.stride() == b.stride() for a, b in zip(model.parameters(), again.parameters(), strict=True))
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(model(x), again(x))


@pytest.fixture
def saved(tmp_path):
    model = CASES["residual"].model()
    return save_pruned(model, tmp_path / "saved", builder=CASES["residual"].build)


def test_nothing_but_the_two_files_is_left(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "shapes.json"]


def test_another_architecture_is_refused(saved, tmp_path):
    with pytest.raises(
        ValueError, match="another architecture: 'the model' is Concat in the network that is built, but Residual"
    ):
        load_pruned(saved, builder=CASES["concat"].build)
    with pytest.raises(ValueError, match="names no library that is supported"):
        load_pruned(saved)
    model = torchvision.models.resnet18()
    with pytest.raises(ValueError, match="another architecture"):
        save_pruned(model, tmp_path / "new", {"library": "torchvision", "name": "resnet34"})
    assert not (tmp_path / "new").exists()


def test_a_builder_of_other_widths_is_refused(saved):
    class Wider(type(CASES["residual"].model())):
        pass

    Wider.__qualname__ = "Residual"

    def build():
        model = Wider()
        model.fc = nn.Linear(6, 5)
        return model

    with pytest.raises(ValueError, match=r"'fc.bias' has the shape \(4,\) in model.safetensors, but .* \(5,\)"):
        load_pruned(saved, builder=build)


def test_files_of_two_saves_are_not_mixed(saved, tmp_path):
    other = CASES["residual"].model()
    other.gap = 3
    folder = save_pruned(other, tmp_path / "other", builder=CASES["residual"].build)
    (folder / "model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(ValueError, match="not saved together"):
        load_pruned(saved, builder=CASES["residual"].build)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(saving.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pruned(CASES["residual"].model(), saved, builder=CASES["residual"].build)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_damaged_and_foreign_files_are_named(saved):
    build = CASES["residual"].build
    with pytest.raises(FileNotFoundError, match=r"no shapes.json in .*nowhere; give the folder"):
        load_pruned(saved / "nowhere", builder=build)
    (saved / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="is damaged"):
        load_pruned(saved, builder=build)
    (saved / "shapes.json").write_text("{}")
    with pytest.raises(ValueError, match="not written by save_pruned"):
        load_pruned(saved, builder=build)
    (saved / "shapes.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_pruned(saved, builder=build)
    (saved / "shapes.json").write_text(json.dumps({"format": saving.FORMAT, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_pruned(saved, builder=build)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"library": "timm", "name": "hf-hub:someone/something"}, ValueError, "has no model 'hf-hub:"),
        ({"library": "torchvision", "name": "resnet17"}, ValueError, "torchvision has no model 'resnet17'"),
        ({"library": "keras", "name": "x"}, ValueError, "names no library"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"pretrained": True}}, ValueError, "ask for weights"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"act_layer": nn.GELU}}, TypeError, "plain JSON"),
    ],
)
def test_bad_sources_are_refused_before_anything_is_written(source, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_pruned(nn.Linear(2, 2), tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "package"), [("safetensors.torch", "safetensors"), ("timm", "timm")])
def test_a_missing_package_is_named(module, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    model = timm.create_model("resnet10t") if module != "timm" else nn.Linear(2, 2)
    with pytest.raises(ImportError, match=rf"package '{package}': pip install (ippro-tp\[)?{package}"):
        save_pruned(model, tmp_path, {"library": "timm", "name": "resnet10t"})


# -- modules that are written down themselves ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s", "mobilevit_xxs", "swin_tiny_patch4_window7_224"])
def test_a_model_is_written_down_by_its_modules(name, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    again = load_pruned(save_pruned(model, tmp_path))
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_shared_modules_and_tied_parameters_stay_one(tmp_path):
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    again = load_pruned(save_pruned(nn.Sequential(layer, nn.ReLU(), layer, other), tmp_path))
    assert again[0] is again[2]
    assert again[0].weight is again[3].weight


def test_recurrent_layers_list_the_parameters_that_they_hold(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4, bidirectional=True)).eval()
    x = torch.randn(5, 2, 3)
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path)
    layer = again[0]
    assert all(
        one is getattr(layer, name)
        for one, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )
    assert all(one() is other for one, other in zip(layer._flat_weight_refs, layer._flat_weights, strict=True))
    assert torch.equal(again(x)[0], model(x)[0])


def test_plain_tensors_that_modules_keep_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    kept = {"cpu": torch.randn(2, 3, dtype=torch.float64), "none": torch.empty(0), "one": torch.tensor(7)}
    model[0].cache, model[0].half = kept, torch.randn(4).bfloat16()
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path)[0]
    assert all(torch.equal(again.cache[key], value) for key, value in kept.items())
    assert torch.equal(again.half, model[0].half)


def test_what_cannot_be_written_down_is_named(tmp_path):
    class Local(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(2, 2))
    for spoiled, message in (
        (nn.Sequential(Local()), "Local', which cannot be imported"),
        (_with(model, opened=sys.stdout), "Sequential.opened"),
        (_with(model, run=json.dumps), "none of the packages"),
        (_with(model, act=lambda x: x), "lambda"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pruned(spoiled, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0 has forward hooks"):
        save_pruned(hooked, tmp_path / "out")


def _with(model: nn.Module, **attributes) -> nn.Module:
    spoiled = nn.Sequential(*model)
    vars(spoiled).update(attributes)
    return spoiled


def test_nothing_but_modules_is_made_of_what_a_file_names(tmp_path):
    save_pruned(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    path = tmp_path / "shapes.json"
    for name in ("os:system", "subprocess:Popen", "torch:Tensor"):
        spec = json.loads(path.read_text())
        spec["source"]["tree"]["modules"][1]["class"] = name
        with pytest.raises(ValueError, match=f"{name} is not a torch.nn.Module"):
            saving._build(spec["source"], None)
