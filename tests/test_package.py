"""What is shipped: built, checked, and used in an empty environment with nothing of the checkout at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_wheel_prunes_in_an_empty_environment(tmp_path):
    script = Path(__file__).parents[1] / ".ci" / "package.py"
    done = subprocess.run([sys.executable, script, tmp_path / "dist"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded" in done.stdout
