"""What is done with a pruned network afterwards: ONNX, torch.compile, masks of a segmentation."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest
import torch

from ippro_tp import load_pruned
from ippro_tp.cli import export
from ippro_tp.cli.errors import UsageError
from ippro_tp.cli.main import main

from .helpers import flags, make_folder, make_masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), (("train", 8), ("val", 4)))


def test_export_without_the_packages_is_refused_at_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    more = ["--train-epochs", "1", "--macs", "0.5", "--export-onnx"]
    assert main(flags(folder, tmp_path / "out", *more)) == 2
    assert (
        "--export-onnx needs onnx, onnxscript, onnxruntime: pip install ippro-tp[onnx]" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_onnx_gives_the_same_numbers(folder, tmp_path):
    for name in export.PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install ippro-tp[onnx])")
    import onnxruntime

    out = tmp_path / "out"
    more = ["--train-epochs", "1", "--macs", "0.5", "--importance", "l2", "--export-onnx"]
    assert main(flags(folder, out, *more)) == 0
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    images = torch.randn(5, 3, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.allclose(found, load_pruned(out)(images).numpy(), rtol=1e-4, atol=1e-4)
    assert json.loads((out / "results.json").read_text())["onnx_difference"] <= 1e-4
    assert "`model.onnx` takes any number of images" in (out / "report.md").read_text()


def test_onnx_that_differs_is_not_kept(tmp_path, monkeypatch):
    for name in export.PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install ippro-tp[onnx])")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2)).eval()
    with pytest.raises(UsageError, match="onnxruntime and PyTorch differ"):
        export.export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_pruned_network_compiles(folder, tmp_path):
    out = tmp_path / "out"
    assert main(flags(folder, out, "--train-epochs", "1", "--macs", "0.5", "--importance", "l2")) == 0
    model = load_pruned(out)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)


@pytest.mark.slow
def test_segmentation_end_to_end(tmp_path):
    """DeepLabV3-ResNet50 with its auxiliary head, on tiny images: every phase, mIoU, the figure of masks."""
    data, out = make_masks(tmp_path / "data"), tmp_path / "out"
    command = flags(data, out, "--library", "torchvision", "--task", "segmentation", "--params", "0.3")
    command[command.index("test_resnet")] = "deeplabv3_resnet50"
    command[command.index("--batch-size") + 1] = "4"
    command += ["--train-epochs", "1", "--finetune-epochs", "1", "--scope", "local"]
    assert main(command) == 0
    result = json.loads((out / "results.json").read_text())
    assert result["metric"] == "mean intersection over union"
    assert abs(result["plan"]["params_fraction"] - 0.3) <= 0.01
    assert all(0 <= value <= 1 for value in result["quality"].values())
    assert result["plan"]["widths"]["classifier.4"] == result["plan"]["widths"]["aux_classifier.4"] == 2
    model = load_pruned(out)
    assert set(model(torch.zeros(1, 3, 32, 40))) == {"out", "aux"}
    pixels = matplotlib.image.imread(out / "figures" / "masks.png")[..., :3]
    assert (np.ptp(pixels, axis=2) > 0.3).mean() > 0.1
