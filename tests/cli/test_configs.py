"""The committed settings of the paper are valid, and prune what they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ippro_tp.cli import settings
from ippro_tp.cli.config import PruneRunConfig, check
from ippro_tp.cli.errors import UsageError
from ippro_tp.cli.main import main

from .helpers import make_folder, make_masks

CONFIGS = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").glob("*.yaml"))
QUICK = ("resnet56_49",)


def test_there_are_the_papers_settings():
    names = {path.stem for path in CONFIGS}
    assert {"resnet50_48", "resnet50_60", "resnet50_74", "mobilenetv2_54", "resnet56_49", "resnet56_72"} <= names
    assert {"vgg19_88", "deeplabv3_resnet50_64", "deeplabv3_resnet50_74", "deeplabv3_resnet50_83"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_flags_of_the_file_are_valid(path):
    values = settings.read(path)
    ratios = values.get("layer_ratios", {})
    values["layer_ratios"] = tuple(f"{p}={r}" for p, r in ratios.items())
    values.setdefault("pretrained", True)
    check(PruneRunConfig(**values, data_dir=Path(".")))


def test_the_command_line_wins():
    path = next(p for p in CONFIGS if p.stem == "resnet50_48")
    words = settings.expand(["prune", "--config", str(path), "--lr", "0.5", "--macs", "0.7", "--compensate"])
    assert words.count("--lr") == 1
    assert "--pruning-ratio" not in words
    assert "--layer-ratios" not in words
    assert "--no-compensate" not in words
    assert words[words.index("--norm-weight-decay") + 1] == "5e-05"
    assert settings.expand(["report", "--config", "x"]) == ["report", "--config", "x"]


@pytest.mark.parametrize(
    ("flags", "unit", "depletion"),
    [
        ({"importance": "pro"}, "macs", "coupled"),
        ({"importance": "pro", "cost": "none"}, "none", "none"),
        ({"importance": "pro", "scope": "local"}, "none", "none"),
        ({"importance": "pro", "depletion": "none"}, "macs", "none"),
        ({"importance": "pro", "depletion": "log"}, "macs", "log"),
        ({}, "macs", "coupled"),
        ({"importance": "pro-mean"}, "macs", "coupled"),
        ({"importance": "pro-mean", "depletion": "log"}, "macs", "log"),
        ({"importance": "pro", "params": 0.5, "macs": None}, "params", "coupled"),
        ({"importance": "l2"}, "none", "none"),
        ({"importance": "l2", "cost": "macs"}, "macs", "none"),
        ({"importance": "l2", "depletion": "log"}, "none", "log"),
        ({"importance": "l2", "depletion": "log", "scope": "local"}, "none", "none"),
    ],
)
def test_cost_and_depletion_that_are_meant(flags, unit, depletion):
    config = PruneRunConfig(**{"macs": 0.5, **flags})
    assert (config.cost_unit, config.depletion_kind) == (unit, depletion)


@pytest.mark.parametrize(
    ("importance", "depletion"), [("pro-paper-lam1", "log"), ("pro-paper-lam1", "coupled"), ("l2", "coupled")]
)
def test_depletion_that_a_criterion_cannot_have_is_refused(importance, depletion):
    config = PruneRunConfig(
        model="resnet18",
        pretrained=True,
        data_dir=Path("."),
        macs=0.5,
        importance=importance,
        depletion=depletion,
    )
    with pytest.raises(UsageError, match=f"--depletion {depletion} is not for --importance {importance}"):
        check(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [("modell: x", "there is no flag 'modell'"), ("- a", "must map flags"), ("a: [", "is not valid YAML")],
)
def test_bad_files_are_named(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        settings.expand(["prune", "--config", str(path)])
    with pytest.raises(UsageError, match="cannot read --config"):
        settings.expand(["prune", f"--config={tmp_path / 'none.yaml'}"])


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in CONFIGS]
)
def test_each_prunes_a_small_run(path, tmp_path):
    """Small images, untrained networks, one step of training; everything else as in the file."""
    if "deeplab" in path.stem:
        data = make_masks(tmp_path / "data")
    else:
        data = make_folder(tmp_path / "data", (("train", 4), ("val", 2)))
    out = tmp_path / "out"
    size = "48" if "deeplab" in path.stem else "64" if "pretrained" in path.read_text() else "32"
    small = [
        "--data-dir",
        str(data),
        "--img-size",
        size,
        "--batch-size",
        "4",
        "--train-epochs",
        "1",
        "--workers",
        "0",
    ]
    small += ["--train-images", "4", "--val-images", "2", "--calibration-images", "4", "--finetune-epochs", "1"]
    assert main(["prune", "--config", str(path), "--out", str(out), *small]) == 0
    assert (out / "model.safetensors").exists()
    widths = json.loads((out / "results.json").read_text())["plan"]["widths"]
    ratios = settings.read(path).get("layer_ratios", {})
    if "shortcut" in ratios:
        first = widths["layer2.0.shortcut"]
        assert first == int(32 * (1 - ratios["shortcut"]))
    if path.stem == "vgg19_88":
        assert widths["features.0"] == int(64 * (1 - 0.65))
        assert widths["features.27"] == int(512 * (1 - 0.70))
        assert widths["features.49"] == int(512 * (1 - 0.60))
