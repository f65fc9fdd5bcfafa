"""The ``ippro-tp prune`` commands of the pages run, on small images and a small network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from ippro_tp import load_pruned
from ippro_tp.cli.main import main

from .helpers import make_folder

ROOT = Path(__file__).parents[2]
SMALL = "--library timm --model test_resnet --train-epochs 1 --finetune-epochs 1 --img-size 32 --batch-size 8"
SMALL += " --calibration-images 8 --workers 0 --importance l2"


def _blocks(path: Path, language: str) -> list[str]:
    blocks = re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.DOTALL)
    return [text for kind, text in blocks if kind == language]


def _commands(path: Path) -> list[list[str]]:
    lines = "\n".join(_blocks(path, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("ippro-tp prune ")]


def _small(words: list[str], images: Path) -> list[str]:
    """Return the arguments of a command with :data:`SMALL` in place of its own values."""
    words = [w for w in words[1:] if w != "--pretrained"]
    words[words.index("IMAGES")] = str(images)
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = str(ROOT / words[place])
    small = shlex.split(SMALL)
    for flag, value in zip(small[::2], small[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


@pytest.mark.parametrize(("path", "count"), [("docs/index.md", 1), ("benchmarks/README.md", 2)])
def test_commands_and_snippets_run(path, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = _commands(ROOT / path)
    assert len(commands) == count
    images = make_folder(tmp_path / "images", (("train", 4), ("val", 2)))
    for words in commands:
        assert main(_small(words, images)) == 0
        folder = Path(words[words.index("--out") + 1])
        assert load_pruned(folder)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    snippets = [text for text in _blocks(ROOT / "benchmarks/README.md", "python") if "load_pruned(" in text]
    for text in snippets if path.startswith("benchmarks") else ():
        space: dict = {}
        exec(text, space)
        assert not space["model"].training
