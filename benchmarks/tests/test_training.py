from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.errors import UsageError
from benchmarks.models.checkpoints import load_checkpoint
from benchmarks.models.cifar import NETWORKS
from benchmarks.models.transformers import CCT, TRANSFORMERS
from benchmarks.training import augment
from benchmarks.training.__main__ import main, round_weights
from benchmarks.training.data import Split, load
from benchmarks.training.loop import accuracy, normalised
from benchmarks.training.progress import Progress, warm_cosine


@pytest.fixture
def data_dir(tmp_path):
    """Eight images a class, each class of one colour."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 80), ("test", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 60, (count, 32, 32, 3)) + 19 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    return tmp_path


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_networks_are_registered_and_end_in_their_classifier(name):
    torch.manual_seed(0)
    model = NETWORKS[name](num_classes=7).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features == 7


def test_cct_is_as_large_as_published():
    assert sum(p.numel() for p in CCT().parameters()) == pytest.approx(0.28e6, rel=0.02)


def test_cct_pools_equal_tokens_to_one_of_them():
    model = CCT(num_classes=3, dim=8, stem=(4,)).eval()
    token = torch.randn(1, 1, 8)
    model.tokenizer, model.blocks, model.norm = nn.Identity(), nn.Identity(), nn.Identity()
    nn.init.zeros_(model.pos_embed)
    tokens = token.expand(1, 64, 8).transpose(1, 2).reshape(1, 8, 8, 8)
    assert torch.allclose(model(tokens), model.fc(token[:, 0]), atol=1e-6)


@pytest.mark.parametrize("name", ["cct2_3x2", "mobilevit"])
def test_rounded_weights_load_into_the_network(name, tmp_path):
    from safetensors.torch import save_file

    model, other = NETWORKS[name]().eval(), NETWORKS[name]().eval()
    save_file(round_weights(model), tmp_path / "net.safetensors")
    load_checkpoint(other, tmp_path / "net.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(other(x), model(x), atol=0.02)
    assert {p.dtype for p in other.parameters()} == {torch.float32}


# -- augmentation ------------------------------------------------------------------------------------------------


def test_shifts_by_nothing_leave_images_or_mirror_them(images):
    out = augment.shift_and_mirror(images, padding=0)
    same = (out == images).all((1, 2, 3))
    assert (same | (out == images.flip(-1)).all((1, 2, 3))).all()
    assert 0 < same.sum() < len(images)


def test_shifts_bring_in_black(images):
    out = augment.shift_and_mirror(images + 1)
    assert out.shape == images.shape
    assert set(out[out < 1].tolist()) == {0.0}
    assert (out > 0).float().mean() > 0.7


def test_distortion_stays_in_range_and_leaves_a_part_alone(images):
    assert torch.allclose(augment.distort(images, 0.0), images, atol=1e-5)
    out = augment.distort(images, 1.0)
    assert out.min() >= 0
    assert out.max() <= 1
    changed = ((out - images).abs().amax((1, 2, 3)) > 1e-3).sum()
    assert 0 < changed < len(images)


def test_erasing_is_a_rectangle_of_some_images(images):
    assert torch.equal(augment.erase(images, 0.0), images)
    changed = (augment.erase(images, 1.0) != images).all(1).float()
    rows, columns = changed.amax(2).sum(1), changed.amax(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), rows * columns)
    assert rows.max() <= 16
    assert rows.min() >= 4


def test_mixing_keeps_shares(images):
    targets = torch.eye(16)
    for seed in range(6):
        mixed, shares = augment.mix(images, targets, random.Random(seed))
        assert mixed.shape == images.shape
        assert torch.allclose(shares.sum(1), torch.ones(16), atol=1e-6)
        pixels = torch.arange(16.0)[:, None, None, None].expand(16, 3, 32, 32)  # an image's number in its pixels
        torch.manual_seed(seed)
        mixed, shares = augment.mix(pixels, targets, random.Random(seed))
        assert torch.allclose(mixed.mean((1, 2, 3)), shares @ torch.arange(16.0), atol=1e-3)


# -- schedule, data, the whole -----------------------------------------------------------------------------------


def test_the_schedule_follows_steps_or_the_clock():
    assert warm_cosine(0.0, 0.1) == pytest.approx(1e-3)
    assert warm_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warm_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warm_cosine(1.0, 0.1) == pytest.approx(0.0)
    progress = Progress(total_steps=4)
    progress.steps = 3
    assert progress.part == 0.75
    assert Progress(total_steps=4, seconds=1e-9).part == 1.0


def test_images_of_an_archive(data_dir):
    train, test = load(data_dir, data_dir, torch.device("cpu"))
    assert train.images.shape == (80, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert test.labels.tolist() == [*range(10)] * 2
    (data_dir / "cifar10.npz").unlink()
    with pytest.raises(UsageError, match="no train images"):
        load(data_dir, data_dir, torch.device("cpu"))
    np.savez(data_dir / "cifar10.npz", train_images=np.zeros(1))
    with pytest.raises(UsageError, match="lacks train_labels"):
        load(data_dir, data_dir, torch.device("cpu"))


def test_accuracy_counts():
    class Colour(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    images[torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])] = 255
    data = Split(images, torch.tensor([0, 1, 2, 0, 1, 0]))
    assert accuracy(Colour(), data, batch_size=4) == pytest.approx(5 / 6)
    assert normalised(torch.full((1, 3, 1, 1), 0.5)).abs().max() < 0.6


@pytest.mark.parametrize("limit", [["--epochs", "2"], ["--minutes", "0.06", "--ema", "0.5"]])
def test_a_network_is_trained_and_told_of(limit, data_dir, monkeypatch):
    monkeypatch.setitem(NETWORKS, "small", lambda num_classes: CCT(num_classes, dim=16, depth=1, stem=(4,)))
    out = data_dir / "out" / "small.safetensors"
    arguments = ["--net", "small", "--data-dir", str(data_dir), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--batch-size", "40", *limit]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["test_images"] == 20
    assert record["steps"] > 0
    if "--epochs" in limit:
        assert record["epochs_done"] == 2
    model = CCT(dim=16, depth=1, stem=(4,))
    load_checkpoint(model, out)
    _, test = load(data_dir, data_dir, torch.device("cpu"))
    assert accuracy(model, test) == record["test_accuracy"]


def test_bad_input_is_one_line(data_dir, capsys):
    arguments = ["--data-dir", str(data_dir), "--out", str(data_dir / "x.safetensors"), "--device", "cpu"]
    assert main(["--net", "nonsense", *arguments]) == 2
    assert "unknown --net 'nonsense'; known: resnet20" in capsys.readouterr().err
    assert main(["--net", "cct2_3x2", *arguments, "--batch-size", "999"]) == 2
    assert "lower --batch-size" in capsys.readouterr().err
