"""Every Python block of the README, of CONTRIBUTING and of docs/ runs, each alone, as it stands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

import ippro_tp
from benchmarks.criteria import registry
from ippro_tp import layers
from ippro_tp.estimators import base

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers"}


def blocks() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        matches = re.finditer(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
        for number, match in enumerate(matches):
            found.append((f"{page.relative_to(ROOT)}#{number}", textwrap.dedent(match.group(2))))
    return found


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of images where the pages have theirs, and pretrained models without a download."""
    image_lib = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
            image_lib.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))


@pytest.fixture(autouse=True)
def _registers(monkeypatch):
    """What a block registers is gone after it."""
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))
    monkeypatch.setattr(layers, "_ACTIVATIONS", set(layers._ACTIVATIONS))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks()])
def test_block_runs(code, images, capsys):
    for package, word in NEEDS.items():
        if re.search(rf"^(import|from) {word}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
    if "print(" in code:
        assert capsys.readouterr().out.strip()


def test_there_are_blocks_on_each_page_of_how_to():
    named = {name.split("#")[0] for name, _ in blocks()}
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "howto" and page.stem != "ddp"}
    assert pages <= named
    assert "README.md" in named


def test_the_api_page_names_all_that_is_public():
    named = re.findall(
        r"^::: ippro_tp\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(ippro_tp.__all__)
