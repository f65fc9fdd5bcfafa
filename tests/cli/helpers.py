"""What the tests of ``prune`` share."""

from __future__ import annotations

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def make_folder(root, counts=(("train", 16), ("val", 6)), size=36):
    generator = np.random.default_rng(0)
    for split, count in counts:
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + generator.normal(0, 60, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def flags(folder, out, *more: str) -> list[str]:
    common = ["prune", "--model", "test_resnet", "--data-dir", str(folder), "--img-size", "32", "--out", str(out)]
    common += ["--batch-size", "8", "--calibration-images", "16", "--workers", "0", "--lr", "0.02"]
    return [*common, *more]


def make_masks(root):
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((48, 64), np.uint8)
            mask[20:, : 20 + 4 * i] = 1
            mask[:5] = 255
            pixels = np.clip(mask[..., None] * 100.0 + generator.normal(60, 20, (48, 64, 3)), 0, 255)
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
    return root
