"""``prune`` on real, if small, folders of images: the whole way, what is wrong with input, what a dry run says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ippro_tp import load_pruned, save_pruned
from ippro_tp.cli import plan as plans
from ippro_tp.cli.config import PruneRunConfig
from ippro_tp.cli.data import build_images
from ippro_tp.cli.errors import UsageError
from ippro_tp.cli.evaluate import accuracy
from ippro_tp.cli.latency import latencies
from ippro_tp.cli.listing import read_listing
from ippro_tp.cli.main import main
from ippro_tp.cli.networks import build_network, check_classes
from ippro_tp.cli.objectives import Segmentation, divergence, mean_iou
from ippro_tp.cli.recipe import Recipe, make_optimizer, make_scheduler
from ippro_tp.cli.report import markdown

from .helpers import COLOURS, flags, make_folder, make_masks


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def weights(folder, tmp_path_factory):
    """A checkpoint of test_resnet with three classes."""
    torch.manual_seed(0)
    config = PruneRunConfig(model="test_resnet", data_dir=folder, img_size=32, seed=5)
    model = build_network(config, list(COLOURS)).model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    more = ["--train-epochs", "2", "--finetune-epochs", "2", "--macs", "0.5", "--distill"]
    assert main(flags(folder, out, *more)) == 0
    return out


def test_the_whole_way(finished, folder):
    result = json.loads((finished / "results.json").read_text())
    assert set(result["quality"]) == {"unpruned", "pruned", "finetuned"}
    assert abs(result["plan"]["macs_fraction"] - 0.5) <= 0.01
    assert len(result["history"]["trained"]) == len(result["history"]["finetuned"]) == 2
    assert result["history"]["trained"][1] < result["history"]["trained"][0]
    report = (finished / "report.md").read_text()
    assert "| pruned, compensated" in report
    assert "| fine-tuned" in report
    assert f"--data-dir {folder}" in report
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "figures", "model.safetensors", "progress", "report.md", "results.json", "shapes.json"
    }  # fmt: skip


def test_the_saved_network_has_the_reported_quality_and_size(finished, folder):
    result = json.loads((finished / "results.json").read_text())
    model = load_pruned(finished)
    config = PruneRunConfig(model="test_resnet", data_dir=folder, img_size=32, workers=0)
    listing = read_listing(config)
    images = build_images(config, listing, build_network(config, listing.classes))
    assert accuracy(model, images.validation(), "cpu") == result["quality"]["finetuned"]
    assert sum(p.numel() for p in model.parameters()) == result["plan"]["params"]
    assert not model.training


def test_the_report_says_when_fine_tuning_did_harm(finished):
    result = json.loads((finished / "results.json").read_text())
    result["quality"] = {"unpruned": 0.9, "pruned": 0.8, "finetuned": 0.7}
    assert "Fine-tuning lowered the quality: choose a lower --lr" in markdown(result, [])
    result["quality"]["finetuned"] = 0.795
    assert "Fine-tuning lowered" not in markdown(result, [])


def test_figures_show_something(finished):
    for name in ("summary", "widths", "scores", "training"):
        pixels = matplotlib.image.imread(finished / "figures" / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 250
        assert len(np.unique(pixels.mean(2).round(2))) > 20  # shades
        assert (np.ptp(pixels, axis=2) > 0.3).mean() > 0.001  # coloured parts


def test_a_finished_run_is_not_run_again(finished, folder, capsys, monkeypatch):
    monkeypatch.setattr(plans.Planner, "plan", lambda *_: pytest.fail("planned again"))
    before = (finished / "model.safetensors").read_bytes()
    more = ["--train-epochs", "2", "--finetune-epochs", "2", "--macs", "0.5", "--distill"]
    assert main(flags(folder, finished, *more)) == 0
    assert "| fine-tuned" in capsys.readouterr().out
    assert (finished / "model.safetensors").read_bytes() == before


def test_another_configuration_is_refused(finished, folder, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    more = ["--train-epochs", "2", "--finetune-epochs", "2", "--macs", "0.6", "--distill"]
    assert main(flags(folder, finished, *more)) == 2
    assert "in use by another configuration (macs: 0.5 -> 0.6)" in _one_line(capsys)
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before


def test_dry_run_lists_the_groups_and_writes_nothing(folder, weights, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--checkpoint", str(weights), "--params", "0.6", "--scope", "local", "--importance", "l1", "--dry-run"]
    assert main(flags(folder, out, *more)) == 0
    text, progress = capsys.readouterr()
    assert "scoring channels (l1)" in progress
    assert "refitting" in progress
    assert "layer1.0.conv1" in text
    assert "lowest score" in text
    assert "parameters" in text
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_seconds_of_pruning_hold_the_search(folder, weights, tmp_path, monkeypatch):
    real = plans.Planner.plan

    def slow(planner, model):
        time.sleep(2)
        return real(planner, model)

    monkeypatch.setattr(plans.Planner, "plan", slow)
    more = ["--checkpoint", str(weights), "--pruning-ratio", "0.3", "--importance", "l2", "--no-compensate"]
    assert main(flags(folder, tmp_path / "out", *more)) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"]["pruned"] >= 2


def test_steps_ratios_and_rounding(folder, weights, tmp_path):
    config = PruneRunConfig(
        model="test_resnet", data_dir=folder, img_size=32, checkpoint=weights, pruning_ratio=0.4, round_to=8,
        layer_ratios=("conv1$=0.6", "downsample=0"), scope="local", importance="l2", calibration_images=16,
        workers=0, compensate=False,
    )  # fmt: skip
    made = _plan(config)
    before, after = made.widths_before, made.record()["widths"]
    assert after["layer1.0.conv1"] == 16  # 32 * 0.4 = 12.8, rounded up to eights
    assert after["layer2.0.conv2"] == before["layer2.0.conv2"]  # shares channels with downsample
    assert all(w % 8 == 0 for n, w in after.items() if n != "fc")
    stepwise = dataclasses.replace(config, pruning_ratio=None, layer_ratios=(), macs=0.6, steps=2, round_to=0)
    made = _plan(stepwise)
    steps = made.result.steps
    assert [round(step.left, 1) for step in steps] == [0.8, 0.6]
    assert 0 < len(steps[1].groups[1].scores) < len(steps[0].groups[1].scores)
    with pytest.raises(UsageError, match=r"no layer that can be pruned matches 'conv9'"):
        _plan(dataclasses.replace(config, layer_ratios=("conv9=0.5",)))


def _plan(config):
    listing = read_listing(config)
    network = build_network(config, listing.classes)
    batches = build_images(config, listing, network).calibration(config.calibration_images)
    return plans.Planner(config, network, batches, torch.device("cpu")).plan(network.model)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_largest_ratio_holds_over_all_steps(scope, folder, weights):
    config = PruneRunConfig(
        model="test_resnet", data_dir=folder, img_size=32, checkpoint=weights, macs=0.2, workers=0, steps=2,
        importance="l2", cost="macs", calibration_images=8, compensate=False, max_pruning_ratio=0.62, scope=scope,
    )  # fmt: skip
    made = _plan(config)
    after = made.record()["widths"]
    left = {name: after[name] / width for name, width in made.widths_before.items() if name != "fc"}
    assert min(left.values()) >= 1 - 0.62
    assert min(left.values()) < 0.5
    with pytest.raises(UsageError, match="cannot be met"):
        _plan(dataclasses.replace(config, macs=0.1))


def test_attention_is_pruned_by_heads(folder):
    config = PruneRunConfig(
        model="vit_tiny_patch16_224", data_dir=folder, img_size=32, macs=0.6, calibration_images=8, workers=0,
        scope="local", importance="l2",
    )  # fmt: skip
    made = _plan(config)
    assert abs(made.result.macs - 0.6) <= 0.01
    attention = made.model.blocks[0].attn
    assert attention.qkv.out_features == 3 * attention.num_heads * attention.head_dim < 576


def test_the_harness_own_networks(folder, tmp_path):
    out = tmp_path / "out"
    own = ["--library", "cifar", "--train-epochs", "1", "--pruning-ratio", "0.3", "--importance", "l1"]
    command = flags(folder, out, *own, "--no-compensate", "--bn-reestimate", "never")
    command[command.index("test_resnet")] = "resnet20"
    assert main(command) == 0
    result = json.loads((out / "results.json").read_text())
    assert set(result["quality"]) == {"unpruned", "pruned"}
    assert "model = load_pruned(" in (out / "report.md").read_text()
    model = load_pruned(out)
    assert sum(p.numel() for p in model.parameters()) == result["plan"]["params"]
    assert model.linear.out_features == 3


def _one_line(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def _break_image(root):
    path = root / "train" / "green" / "3.png"
    path.write_bytes(path.read_bytes()[:200])


BAD = {
    "missing folder": (None, [], "--data-dir nowhere is not a folder"),
    "no val": (lambda root: shutil.rmtree(root / "val"), [], "holds no val/ or test/"),
    "empty class": (
        lambda root: [p.unlink() for p in (root / "val" / "red").iterdir()], [], "val/red holds no images",
    ),
    "class unknown to train": (
        lambda root: (root / "train" / "red").rename(root / "train" / "rot"), [], "class without training images",
    ),
    "corrupt image": (_break_image, [], "train/green/3.png is not a readable image"),
    "unknown model": (None, ["--model", "resnet1"], "--library timm has no model 'resnet1'"),
    "unknown importance": (None, ["--importance", "magic"], "unknown importance 'magic'; known: pro"),
    "no target": (None, ["--macs", "None"], "one of --macs, --params, --latency, --pruning-ratio; got none"),
    "two targets": (None, ["--params", "0.5"], "got --macs, --params"),
    "percent": (None, ["--macs", "50"], "--macs is a fraction between 0 and 1; got 50"),
    "untrained": (None, ["--checkpoint", "None"], "an untrained network is not worth pruning"),
    "no checkpoint": (None, ["--checkpoint", "nothing.safetensors"], "no checkpoint at nothing.safetensors"),
    "other checkpoint": (None, ["--model", "resnet18"], "does not fit the architecture of ResNet"),
    "unreachable": (None, ["--macs", "0.001"], "macs=0.001 cannot be met within 0.01% of the whole"),
    "bad ratios": (
        None, ["--macs", "None", "--pruning-ratio", "0.3", "--layer-ratios", "layer1"], "write PATTERN=RATIO",
    ),
    "device": (None, ["--device", "cuda:77"], "--device cuda:77: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, folder, weights, tmp_path, capsys):
    spoil, more, message = BAD[case]
    data = folder
    if spoil is not None:
        data = tmp_path / "data"
        shutil.copytree(folder, data)
        spoil(data)
    if case == "missing folder":
        data = "nowhere"
    command = flags(data, tmp_path / "out", "--checkpoint", str(weights), "--macs", "0.5")
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in command:
            command[command.index(flag) + 1] = value
        else:
            command += [flag, value]
    assert main(command) == 2
    assert message in _one_line(capsys)
    assert not (tmp_path / "out").exists()


def all_outputs(num_classes):
    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, num_classes)

        def forward(self, x):
            return self.layer(x.mean((2, 3)))

    return OneLayer()


def test_a_network_without_channels_that_can_go(folder, tmp_path, capsys):
    command = flags(folder, tmp_path / "out", "--library", "python", "--train-epochs", "1", "--macs", "0.5")
    command[command.index("test_resnet")] = f"{__name__}:all_outputs"
    assert main(command) == 2
    assert "no group of channels can be pruned: layer.out (its channels are the model's output)" in _one_line(
        capsys
    )
    assert not (tmp_path / "out").exists()


def test_an_unreachable_target_is_refused_before_training(folder, tmp_path, capsys):
    more = ["--train-epochs", "9", "--macs", "0.1", "--max-pruning-ratio", "0.5"]
    assert main(flags(folder, tmp_path / "out", *more)) == 2
    assert "macs=0.1 cannot be met within 1% of the whole" in _one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--macs", "0.001"], ["--macs", "0.5", "--round-to", "64"]])
def test_no_way_of_pruning_is_tried_in_vain(more, folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "out", "--train-epochs", "1", *more)) == 2
    assert "cannot be met within " in _one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(folder, weights, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    command = flags(folder, tmp_path / "file" / "out", "--checkpoint", str(weights), "--pruning-ratio", "0.3")
    assert main([*command, "--importance", "l2", "--no-compensate"]) == 2
    assert "file/out cannot be written (Not a directory); choose another" in _one_line(capsys)


def test_a_target_missed_after_training_names_the_trained_network(folder, tmp_path, capsys, monkeypatch):
    def missed(*_):
        raise UsageError("macs 0.5 cannot be reached")

    out = tmp_path / "out"
    more = ["--train-epochs", "1", "--macs", "0.5", "--importance", "l2", "--no-compensate"]
    with monkeypatch.context() as patch:
        patch.setattr(plans.Planner, "plan", missed)
        assert main(flags(folder, out, *more)) == 2
    trained = out / "progress" / "unpruned.safetensors"
    assert _one_line(capsys).endswith(f"the trained network is {trained}, for --checkpoint and another --out")
    more = ["--checkpoint", str(trained), *more[2:]]
    assert main(flags(folder, tmp_path / "again", *more)) == 0


def test_a_loss_without_bounds_is_one_line(folder, weights, tmp_path, capsys):
    more = ["--checkpoint", str(weights), "--pruning-ratio", "0.3", "--importance", "l2", "--no-compensate"]
    command = flags(folder, tmp_path / "out", *more, "--finetune-epochs", "1")
    command[command.index("0.02")] = "1e30"
    assert main(command) == 2
    assert "in epoch 1 (finetuned): choose a lower --lr, and another --out" in _one_line(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_masks_of_more_classes_than_outputs_are_refused(tmp_path):
    config = PruneRunConfig(model="lraspp_mobilenet_v3_large", library="torchvision", task="segmentation",
                            data_dir=make_masks(tmp_path), workers=0)  # fmt: skip
    assert len(read_listing(config).classes) == 2
    path = tmp_path / "val" / "masks" / "1.png"
    mask = np.array(Image.open(path))
    mask[-1] = 4  # a class that the training masks lack
    Image.fromarray(mask).save(path)
    classes = read_listing(config).classes
    assert len(classes) == 5
    check_classes(config, classes, 21)
    with pytest.raises(UsageError, match="the masks hold numbers up to 4, the network has 2 outputs"):
        check_classes(config, classes, 2)


def test_tracing_without_end_is_given_up(folder, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plans, "TRACE_SECONDS", 0.01)
    assert main(flags(folder, tmp_path / "out", "--checkpoint", str(weights), "--macs", "0.5")) == 2
    assert "cannot be pruned: TimeoutError: it takes more than 0.01 s" in _one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(folder, weights, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert main(flags(folder, tmp_path, "--checkpoint", str(weights), "--macs", "0.5")) == 2
    assert "holds other files" in _one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_batches_are_functions_of_seed_and_epoch(folder):
    config = PruneRunConfig(model="test_resnet", data_dir=folder, img_size=32, workers=0, batch_size=8)
    listing = read_listing(config)
    network = build_network(config, listing.classes)
    first, again = (list(build_images(config, listing, network).epoch("finetuned", 1)) for _ in range(2))
    assert len(first) == 6
    later = list(build_images(config, listing, network).epoch("finetuned", 1, start=4))
    others = list(build_images(config, listing, network).epoch("finetuned", 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[4:], later, strict=True))
    assert not torch.equal(first[0][0], others[0][0])


def test_recipe_groups_and_schedules():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    recipe = Recipe(4, 1.0, norm_weight_decay=0.0, norm_momentum=0.0, schedule="step", step_epochs=2)
    optimizer = make_optimizer(model, recipe, frozen=("2.bias",))
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 2]
    assert [(g["weight_decay"], g["momentum"]) for g in optimizer.param_groups] == [(1e-4, 0.9), (0.0, 0.0)]
    scheduler = make_scheduler(optimizer, recipe, steps_per_epoch=2)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])
    cosine = make_scheduler(make_optimizer(model, Recipe(2, 1.0)), Recipe(2, 1.0), 5).lr_lambdas[0]
    assert [cosine(0), cosine(5), cosine(10)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("how", ["batch", "frozen"])
def test_statistics_stay_while_fine_tuning_if_asked(how, folder, weights, tmp_path):
    out = tmp_path / "out"
    more = ["--checkpoint", str(weights), "--pruning-ratio", "0.3", "--importance", "l2", "--no-compensate"]
    more += ["--bn-reestimate", "never", "--finetune-epochs", "1", "--norm-statistics", how]
    assert main(flags(folder, out, *more)) == 0
    before, after = load_file(weights), load_pruned(out).state_dict()

    def left(name):
        return set(after[name].tolist()) <= set(before[name].tolist())

    assert left("bn1.running_mean") is (how == "frozen")
    assert not left("bn1.weight")  # it was trained


def test_divergence_is_zero_for_equal_predictions_only():
    logits = torch.randn(4, 5)
    assert divergence(logits, logits + 3).abs() < 1e-5
    assert divergence(logits, -logits) > 0.01


def test_mean_iou_by_hand():
    task = Segmentation(3, 255)
    truth = torch.tensor([[0, 0, 1, 255]])
    confusion = task.confusion(truth, torch.tensor([[0, 1, 1, 2]]))
    assert mean_iou(confusion) == pytest.approx((1 / 2 + 1 / 2) / 2)
    logits = torch.randn(1, 3, 1, 4)
    masked = torch.tensor([[[0, 0, 1, 2]]])
    masked[..., 3] = 255
    by_hand = nn.functional.cross_entropy(logits[..., :3], masked[..., :3])
    assert torch.allclose(task.loss({"out": logits}, masked), by_hand)
    assert torch.allclose(task.loss({"out": logits, "aux": logits}, masked), 1.5 * by_hand)


def test_the_ten_lines_of_python(tmp_path):
    import timm
    import torch_pruning as tp

    from ippro_tp import Compensation, PROImportance

    model = timm.create_model("test_resnet", num_classes=3).eval()
    loader = [(torch.randn(8, 3, 32, 32), torch.zeros(8).long())]
    imp, comp = PROImportance(), Compensation()
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 3, 32, 32), imp, pruning_ratio=0.3, global_pruning=True, ignored_layers=[model.fc]
    )
    imp.calibrate(pruner, loader, progress=False)
    comp.calibrate(pruner, loader, progress=False)
    comp.step(pruner)
    save_pruned(model, tmp_path, {"library": "timm", "name": "test_resnet", "kwargs": {"num_classes": 3}})
    assert torch.equal(load_pruned(tmp_path)(loader[0][0]), model(loader[0][0]))


def test_latency_is_measured_in_turns():
    order = []

    class Slow(nn.Module):
        def __init__(self, name, seconds):
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, x):
            order.append(self.name)
            time.sleep(self.seconds)
            return x

    found = latencies({"a": Slow("a", 0.02), "b": Slow("b", 0.005)}, torch.zeros(1, 3, 4, 4), 0.1)
    assert 0.02 <= found["a"]["median_seconds"] < 0.2
    assert 0.005 <= found["b"]["median_seconds"] < found["a"]["median_seconds"]
    assert found["a"]["runs"] >= 5
    assert sum(one != other for one, other in pairwise(order)) == 9
