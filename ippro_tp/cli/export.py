"""``--export-onnx``: the pruned network as ONNX, compared with PyTorch before it is kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.losses import main_output
from .errors import UsageError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4


def check_packages() -> None:
    """Raise UsageError unless everything for the export is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--export-onnx needs {', '.join(missing)}: pip install ippro-tp[onnx]")


class _MainOutput(nn.Module):
    """The network with its one output that matters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return main_output(self.model(x))


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write ``model`` to ``path`` with a free batch size; return the largest relative difference from PyTorch.

    Args:
        model: In eval mode, on the CPU.
        example: One input, ``[1, C, H, W]``.
        path: The ``.onnx`` file; it appears whole or not at all.

    Raises:
        UsageError: onnxruntime gives other numbers than PyTorch.
    """
    import onnxruntime

    wrapped = _MainOutput(model).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *example.shape[1:], generator=generator)
    partial = path.with_name("." + path.name + ".tmp")
    try:
        program = torch.onnx.export(
            wrapped, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        assert program is not None
        program.save(str(partial), external_data=False)
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        worst = 0.0
        for batch in (images, torch.randn(3, *example.shape[1:], generator=generator)):
            with torch.no_grad():
                wanted = wrapped(batch).numpy()
            (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            worst = max(worst, float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-12)))
        if not worst <= TOLERANCE:
            raise UsageError(f"onnxruntime and PyTorch differ by {worst:.1e}; the ONNX file was not kept")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return worst
