"""The two-layer experiment runs from image folders to tables."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from benchmarks.errors import UsageError
from benchmarks.paper import mnist_two_layer
from benchmarks.paper.mnist_two_layer import MnistConfig


@pytest.fixture
def digits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for digit in range(10):
            folder = tmp_path / split / str(digit)
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 60, (28, 28), generator=generator, dtype=torch.uint8)
                noise[2 * digit : 2 * digit + 4] += 150
                Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return tmp_path


def test_all_arms_prune_to_every_size(digits, tmp_path):
    config = MnistConfig(
        digits, tmp_path / "out", width=40, keep=(5, 12), seeds=(0, 1), train_images=50, epochs=3, trials=2
    )
    record = mnist_two_layer.run(config)
    rows = [row for row in record["rows"] if row["arm"] != "dense"]
    assert len(rows) == 2 * 2 * len(mnist_two_layer.ARMS)
    assert all(row["units"] == row["keep"] and row["residual"] > 0 for row in rows)
    assert json.loads((tmp_path / "out" / "ispasp_mnist.json").read_text())["rows"] == record["rows"]
    text = (tmp_path / "out" / "ispasp_mnist.md").read_text()
    assert text.count("| i-SpaSP ") == 2
    assert "keep 12" in text


def test_the_residual_decays_polynomially_and_faster_for_smaller_p():
    rows = mnist_two_layer.synthetic(3, widths=(100,))
    exponents = [row["exponent"] for row in rows]
    assert exponents == sorted(exponents)
    assert all(row["exponent"] < row["bound"] and row["r2"] > 0.9 for row in rows)


@pytest.mark.parametrize(
    ("change", "message"), [({"keep": (40,)}, "--keep"), ({"keep": ()}, "--keep"), ({}, "--data-dir")]
)
def test_wrong_flags_are_named(tmp_path, change, message):
    config = {"data_dir": tmp_path / "none", "width": 40, "keep": (5,), **change}
    with pytest.raises(UsageError, match=message):
        mnist_two_layer.run(MnistConfig(**config))
