from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.harness.evaluate import accuracy, reestimate_batchnorm
from benchmarks.harness.finetune import Recipe, finetune
from benchmarks.models.small_resnet import SmallResNet
from benchmarks.tasks import TaskConfig, build_task, digits, export
from benchmarks.tasks.base import TensorImages, flip_and_crop
from benchmarks.tasks.cifar10 import cifar_images
from benchmarks.tasks.imagefolder import FolderImages, output_indices
from ippro_tp.cli.cifar_resnet import CifarResNet
from ippro_tp.cli.config import PruneRunConfig
from ippro_tp.cli.data import build_images
from ippro_tp.cli.listing import read_listing
from ippro_tp.cli.networks import build_network


def test_calibration_is_a_function_of_the_seed_and_avoids_the_heldout_part(small_task):
    first, again, other = (small_task.calibration(seed, 20, 8) for seed in (0, 0, 1))
    assert [len(x) for x, _ in first] == [8, 8, 4]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    drawn = torch.cat([x for x, _ in small_task.calibration(0, 1000, 8)])
    held_out = torch.cat([x for x, _ in small_task.evaluation("heldout", 0, 8)])
    assert len(drawn) == 54
    assert len(held_out) == 6
    assert not any((drawn == image).flatten(1).all(1).any() for image in held_out)


def test_limited_evaluation_is_fixed(small_task):
    first, again = (torch.cat([y for _, y in small_task.evaluation("test", 10, 4)]) for _ in range(2))
    assert len(first) == 10
    assert torch.equal(first, again)


def test_reestimated_statistics_are_those_of_the_batches(small_task):
    model = small_task.model
    batches = small_task.calibration(0, 20, 10)
    reestimate_batchnorm(model, batches, "cpu")
    means = torch.stack([model.conv1(x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    assert torch.allclose(model.bn1.running_mean, means, atol=1e-5)
    assert not model.training


def test_finetune_repeats_and_leaves_frozen_parameters(small_task):
    import copy

    small_task.frozen = ("conv1.weight",)
    models = [copy.deepcopy(small_task.model) for _ in range(2)]
    losses = [finetune(m, small_task, Recipe(epochs=1, batch_size=16), 3, "cpu") for m in models]
    assert losses[0] == losses[1]
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)
    assert torch.equal(models[0].conv1.weight, small_task.model.conv1.weight)
    assert not torch.equal(models[0].fc.weight, small_task.model.fc.weight)


def test_accuracy_counts(small_task):
    labels = [small_task.model(x).argmax(1) for x, _ in small_task.evaluation("test", 0, 7)]
    images = [x for x, _ in small_task.evaluation("test", 0, 7)]
    assert accuracy(small_task.model, zip(images, labels, strict=True), "cpu") == 1.0
    assert accuracy(small_task.model, [(images[0], labels[0] + 1)], "cpu") == 0.0


def test_crop_without_shift_is_the_image_or_its_mirror():
    images = torch.randn(6, 2, 5, 5)
    for image, out in zip(images, flip_and_crop(images, torch.Generator().manual_seed(0), padding=0), strict=True):
        assert torch.equal(image, out) or torch.equal(image.flip(-1), out)


def _folders(root, names, size=32):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def test_cifar_folder_is_decoded_once(tmp_path):
    _folders(tmp_path / "data" / "test", ["cat", "dog"])
    first = cifar_images(tmp_path / "data", "test", tmp_path / "cache")
    assert first.images.shape == (4, 3, 32, 32)
    assert first.labels.tolist() == [0, 0, 1, 1]
    again = cifar_images(tmp_path / "data", "test", tmp_path / "cache")
    assert torch.equal(first.images, again.images)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_folder_names_tell_the_output(tmp_path):
    assert output_indices(["0217_springer", "0482_cassette"], 1000) == [217, 482]
    assert output_indices(["b", "c"], 2) == [0, 1]
    with pytest.raises(UsageError, match="name each folder after its output"):
        output_indices(["springer", "cassette"], 1000)
    _folders(tmp_path, ["0007_a", "0003_b"], size=4)
    images = FolderImages(tmp_path, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1), 10)
    pixels, labels = images.batch(torch.tensor([3, 0]))
    assert pixels.shape == (2, 3, 4, 4)
    assert labels.tolist() == [7, 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(task="mnist"), "known tasks: digits, cifar10, imagefolder"),
        (TaskConfig(task="cifar10"), "--checkpoint"),
        (TaskConfig(task="cifar10", model="resnet18"), "known: resnet20"),
        (TaskConfig(task="imagefolder"), "--model NAME and --data-dir"),
        (TaskConfig(task="digits", model="vgg"), "one network"),
    ],
)
def test_bad_input_names_cause_and_fix(config, message):
    with pytest.raises(UsageError, match=message):
        build_task(config)


def test_evaluation_can_be_imported_first():
    subprocess.run(
        [sys.executable, "-c", "from benchmarks.harness.evaluate import accuracy"],
        check=True,
        cwd=Path(__file__).parents[2],
    )


def test_shifted_images_have_black_borders_not_grey_ones():
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = TensorImages(images, torch.zeros(64, dtype=torch.long), mean, std)
    black = -torch.tensor(mean) / torch.tensor(std)
    batch = pixels.batch(torch.arange(64))[0]
    shifted = flip_and_crop(batch, torch.Generator().manual_seed(0), border=black)
    back = (shifted * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)) * 255
    border = back.amax(1) < 0.5  # the images themselves hold no black
    assert 0.2 < border.float().mean() < 0.6
    assert back[border.unsqueeze(1).expand_as(back)].abs().max() < 1e-3


def test_cifar_tasks_shift_in_black(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (32, 32)).save(tmp_path / split / name / f"{i}.png")
    weights = tmp_path / "resnet20.safetensors"
    save_file(CifarResNet(20).state_dict(), weights)
    task = build_task(
        TaskConfig(
            task="cifar10", model="resnet20", checkpoint=weights, data_dir=tmp_path, cache_dir=tmp_path / "cache"
        )
    )
    batches = task.calibration(0, 4, 2)
    for (plain, _), (shifted, _) in zip(batches, task.augmented(batches, 0), strict=True):
        torch.testing.assert_close(shifted, plain)


def test_an_exported_task_is_what_the_command_line_reads(small_task, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "build_task", lambda config: small_task)
    monkeypatch.setitem(SmallResNet.pretrained_cfg, "mean", (0.5,))
    monkeypatch.setitem(SmallResNet.pretrained_cfg, "std", (0.5,))
    out = tmp_path / "export"
    assert main(["export", "--out", str(out)]) == 0
    config = PruneRunConfig(
        model="benchmarks.models.small_resnet:SmallResNet", library="python", data_dir=out, train_epochs=1
    )
    listing = read_listing(config)
    images = build_images(config, listing, build_network(config, listing.classes))
    read = {path.stem: images.val[-1, i] for i, (path, _) in enumerate(images.val.samples)}
    pixels, labels = small_task.test.batch(torch.arange(60))
    assert torch.equal(torch.stack([read[f"{i:05d}"][0] for i in range(60)]), pixels)
    assert [read[f"{i:05d}"][1] for i in range(60)] == labels.tolist()
    weights = load_file(out / "network.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in small_task.model.state_dict().items())
    monkeypatch.setattr(export, "build_task", None)
    assert main(["export", "--out", str(out)]) == 0


def test_the_digits_network_says_how_its_images_are_normalised():
    train, _ = digits.digit_images()
    assert (train.mean, train.std) == (SmallResNet.pretrained_cfg["mean"], SmallResNet.pretrained_cfg["std"])
