"""Reading weights: safetensors or plain PyTorch state dicts, with errors that name cause and fix."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UsageError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in ``path`` without a ``state_dict`` wrapper and without ``module.`` prefixes.

    Args:
        path: A ``.safetensors`` file, or a file written by ``torch.save`` that holds tensors only.

    Raises:
        UsageError: The file does not exist or holds something else.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}; give an existing file with --checkpoint")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files, and pickles of anything but tensors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UsageError(f"{path} cannot be read as a state dict ({reason}); save model.state_dict()") from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"{path} holds objects other than tensors; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_checkpoint(model: nn.Module, path: Path, fixed: tuple[str, ...] = ()) -> None:
    """Load ``path`` into ``model``; every name and shape must fit.

    Args:
        model: The network, changed in place.
        path: The checkpoint.
        fixed: Names of parameters that belong to the architecture and that a checkpoint need not hold.

    Raises:
        UsageError: The checkpoint is of another architecture.
    """
    state, own = read_state_dict(path), model.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")} | set(fixed)
    missing = sorted(set(own) - set(state) - optional)
    unknown = sorted(set(state) - set(own))
    wrong = sorted(n for n in set(own) & set(state) if own[n].shape != state[n].shape)
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", wrong)):
        if names:
            raise UsageError(
                f"{path.name} does not fit the architecture of {type(model).__name__}: it {problem} "
                f"{len(names)} entries, first {names[0]!r}; choose the matching --model"
            )
    model.load_state_dict(state, strict=False)


def fingerprint(model: nn.Module) -> str:
    """Return 12 hexadecimal digits that identify the weights and buffers of ``model``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
