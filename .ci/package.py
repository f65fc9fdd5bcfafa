"""Build sdist and wheel and use the wheel as a stranger would: in an empty environment, outside the checkout.

    python .ci/package.py [DIST]      # DIST: where sdist and wheel are left; by default nowhere

Standard library only; downloads torch. Exits with an error at the first thing that is not as promised.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

IMAGES = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
generator = np.random.default_rng(0)
for split, count in (("train", 16), ("val", 8)):
    for name, colour in {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}.items():
        folder = Path("images", split, name)
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(colour + generator.normal(0, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
"""
CORE = """
import importlib.util, sys
import torch
from torch import nn
import ippro_tp
assert not [name for name in ("timm", "torchvision", "safetensors", "tyro") if importlib.util.find_spec(name)]
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.LazyLinear(4)).eval()
batches = [torch.randn(8, 3, 10, 10) for _ in range(2)]
model(batches[0])
result = ippro_tp.prune(model, batches[0][:1], batches, macs=0.5, progress=False)
assert abs(result.macs - 0.5) <= 0.05, result.macs
print(result)
"""
LOAD = """
import torch
import ippro_tp
model = ippro_tp.load_pruned("pruned")
output = model(torch.zeros(2, 3, 32, 32))
assert output.shape == (2, 3) and output.isfinite().all()
assert "site-packages" in ippro_tp.__file__, ippro_tp.__file__
print("loaded", type(model).__name__, sum(p.numel() for p in model.parameters()), "parameters")
"""
PRUNE = (
    "prune --model test_resnet --data-dir images --img-size 32 --train-epochs 2 --lr 0.02 --batch-size 8 "
    "--calibration-images 16 --workers 0 --macs 0.5 --device cpu --out pruned"
)


def run(*words: object, cwd: Path, fails: bool = False) -> str:
    """Run a command away from the checkout and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
    print("$", *(str(word)[:100].strip().replace("\n", "; ") for word in words), flush=True)
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=environment, capture_output=True, text=True)
    if (done.returncode != 0) != fails:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def environment(folder: Path) -> Path:
    """Make an empty virtual environment and return the folder of its programs."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def build(dist: Path, work: Path) -> Path:
    """Build the sdist, and the wheel from the sdist; check both and return the wheel."""
    programs = environment(work / "tools")
    run(programs / "python", "-m", "pip", "install", "--quiet", "build", "twine", cwd=work)
    run(programs / "python", "-m", "build", "--outdir", dist, ROOT, cwd=work)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    run(programs / "python", "-m", "twine", "check", "--strict", sdist, wheel, cwd=work)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "ippro_tp/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ippro_tp"}, names
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tests/test_prune.py", "docs/index.md"} <= inside
    print(
        f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} kB, {sdist.name}: {sdist.stat().st_size / 1000:.0f} kB"
    )
    return wheel


def use(wheel: Path, work: Path) -> None:
    """Install the wheel, first alone and then with the command line, and prune."""
    programs, away = environment(work / "user"), work / "away"
    away.mkdir()
    python = programs / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=away)
    print(run(python, "-c", CORE, cwd=away).split("\n\n")[0])
    assert "pip install ippro-tp[cli]" in run(programs / "ippro-tp", "--help", cwd=away, fails=True)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cli]", cwd=away)
    run(python, "-c", IMAGES, cwd=away)
    print(run(programs / "ippro-tp", *PRUNE.split(), cwd=away))
    print(run(python, "-c", LOAD, cwd=away))


def main() -> None:
    """Do all of it in a temporary folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        dist = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else work / "dist"
        if dist.exists() and any(dist.iterdir()):
            sys.exit(f"{dist} is not empty")
        use(build(dist, work), work)


if __name__ == "__main__":
    main()
