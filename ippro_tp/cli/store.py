"""The folder of a run: whose it is, what is done, and checkpoints; every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError
from .files import environment, write_json

CONFIG, PROGRESS = "config.json", "progress"


class Store:
    """Results of the phases of one run, kept under its folder.

    Args:
        folder: The ``--out`` folder.
        identity: What decides the result.
        command: All flags, for the record.

    Raises:
        UsageError: The folder belongs to another configuration, or to something else, or cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], command: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        check_folder(folder, self.identity)
        try:
            if not (folder / CONFIG).exists():
                record = {"identity": identity, "command": command, "environment": environment()}
                write_json(folder / CONFIG, record)
            self.progress.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder} cannot be written ({error.strerror}); choose another") from error
        for stale in [*folder.glob("*.tmp"), *folder.glob(".*.tmp"), *self.progress.rglob("*.tmp")]:
            stale.unlink()

    @property
    def progress(self) -> Path:
        """Folder of what a killed run needs to go on."""
        return self.folder / PROGRESS

    def result(self, phase: str) -> dict[str, Any] | None:
        """Return what :meth:`record` was given for ``phase``, or None."""
        path = self.progress / f"{phase}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def record(self, phase: str, result: dict[str, Any]) -> dict[str, Any]:
        """Keep ``result``: ``phase`` is done."""
        write_json(self.progress / f"{phase}.json", result)
        return result

    def save_checkpoint(self, phase: str, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors and plain values) as the newest checkpoint of ``phase``."""
        path = self.progress / f"{phase}.pt"
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load_checkpoint(self, phase: str) -> dict[str, Any] | None:
        """Return the newest checkpoint of ``phase``, read without pickled code, or None."""
        path = self.progress / f"{phase}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def drop_checkpoint(self, phase: str) -> None:
        """Delete the checkpoint of a phase that is done."""
        (self.progress / f"{phase}.pt").unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete the intermediate networks of a finished run; results stay."""
        for folder in self.progress.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)


def check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UsageError if ``folder`` is used by anything but a run of this identity."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder")
    path = folder / CONFIG
    if not path.exists():
        if folder.exists() and any(not p.name.endswith(".tmp") for p in folder.iterdir()):
            raise UsageError(f"--out {folder} holds other files; choose an empty or new folder")
        return
    try:
        stored = json.loads(path.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} was not written by prune ({error!r}); choose another --out") from error
    wanted = json.loads(json.dumps(identity))
    keys = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    if keys:
        changes = ", ".join(f"{k}: {stored.get(k)!r} -> {wanted.get(k)!r}" for k in keys)
        raise UsageError(f"--out {folder} is in use by another configuration ({changes}); choose another --out")
