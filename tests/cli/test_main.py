"""The command line itself: how it starts, what it says, inspect and report."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ippro_tp.cli.main import main

from .helpers import flags, make_folder

HEAVY = ("torch", "timm", "torchvision", "matplotlib", "torch_pruning", "pandas", "numpy")


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    code = (
        "from ippro_tp.cli.main import main\n"
        "for words in (['--help'], ['prune', '--help'], ['inspect', '--help'], ['report', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as e: assert not e.code"
    )
    assert not _modules_after(code) & set(HEAVY)


def test_the_package_is_imported_name_by_name():
    assert not _modules_after("import ippro_tp") & set(HEAVY)
    import ippro_tp

    assert all(getattr(ippro_tp, name) is not None for name in ippro_tp.__all__)
    assert {name for names in ippro_tp._HOMES.values() for name in names} == set(ippro_tp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        _ = ippro_tp.pruned


@pytest.mark.parametrize("command", ["prune", "inspect", "report"])
def test_help_shows_the_flags(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "ippro-tp" in text
    assert {"prune": "--latency", "inspect": "--num-classes", "report": "DIRECTORY"}[command] in text.replace(
        "PATH", "DIRECTORY"
    )


def test_works_without_resource():
    code = "sys.modules['resource'] = None\nimport ippro_tp.cli.run, ippro_tp.cli.runs, ippro_tp.cli.inspection"
    _modules_after(code)


def test_inspect_shows_groups_and_what_is_left_whole(capsys):
    assert main(["inspect", "--model", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "3"]) == 0
    text = capsys.readouterr().out
    assert "blocks.0.mlp.fc1.out" in text
    assert "head.out: its channels are the model's output" in text
    assert main(["inspect", "--model", "vit_tiny_patch16_224", "--img-size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    attention = next(group for group in found["groups"] if "attn.qkv" in group["key"])
    assert (attention["width"], attention["units"]) == (576, 3)
    assert sum(group["macs"] for group in found["groups"]) >= found["macs"] * 0.9


def test_inspect_names_an_unknown_model(capsys):
    assert main(["inspect", "--model", "resnet1"]) == 2
    assert "has no model 'resnet1'" in capsys.readouterr().err


def test_report_of_one_run_and_of_several(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", (("train", 4), ("val", 2)))
    more = ["--train-epochs", "1", "--pruning-ratio", "0.3", "--importance", "l2", "--no-compensate"]
    for seed in ("0", "1"):
        assert main(flags(folder, tmp_path / "runs" / seed, *more, "--seed", seed)) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "runs" / "0")]) == 0
    assert "## How it was pruned" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "runs")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| l2"))
    assert "|      2 |" in row or "| 2" in row
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_networks_of_this_folder_are_found_by_the_installed_script_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "net_of_this_folder.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), *pool, nn.Linear(8, num_classes))\n"
        "    model.pretrained_cfg = {'input_size': (1, 12, 12), 'mean': (0.5,), 'std': (0.5,), 'crop_pct': 1.0}\n"
        "    return model\n"
    )
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--library", "python", "--model", "net_of_this_folder:build"]) == 0
    assert "0.out" in capsys.readouterr().out
