"""``--config FILE``: flags from a YAML file; those on the command line win."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

from .config import PruneRunConfig
from .errors import UsageError

TARGETS = ("macs", "params", "latency", "pruning_ratio")


def expand(arguments: list[str]) -> list[str]:
    """Return the command line with the flags of its ``--config`` file, if it has one, put in.

    A flag that is given keeps its value; a target that is given replaces the file's, and its layer ratios too.

    Raises:
        UsageError: The file is missing, no YAML mapping, or names a flag that does not exist.
    """
    if arguments[:1] != ["prune"]:
        return arguments
    paths = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    paths += [after for flag, after in pairwise(arguments) if flag == "--config"]
    if not paths:
        return arguments
    given = {a.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in arguments}
    if given & set(TARGETS):
        given |= {*TARGETS, "layer_ratios"}
    if given & {"pretrained", "checkpoint", "train_epochs"}:
        given |= {"pretrained", "checkpoint"}
    return [*arguments, *(word for key, value in read(Path(paths[-1])).items() if key not in given
                          for word in _words(key, value))]  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """Return the flags of a file by field name; ``layer_ratios`` may be a mapping from pattern to ratio."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UsageError("--config needs PyYAML: pip install ippro-tp[cli]") from error
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path} must map flags to values, as in `model: resnet50`")
    known = {f.name for f in dataclasses.fields(PruneRunConfig)}
    settings = {str(key).replace("-", "_"): value for key, value in settings.items()}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f"--config {path}: there is no flag {unknown[0]!r}; see ippro-tp prune --help")
    return settings


def _words(key: str, value: object) -> list[str]:
    flag = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        return [flag, *(f"{pattern}={ratio}" for pattern, ratio in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]
