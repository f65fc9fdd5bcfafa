"""Command line: ``ippro-tp COMMAND --help``. Torch and the rest are imported when a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .config import InspectConfig, PruneRunConfig, ReportConfig
from .errors import UsageError

COMMANDS: dict[str, tuple[type[Any], str]] = {
    "prune": (PruneRunConfig, "run"),
    "report": (ReportConfig, "runs"),
    "inspect": (InspectConfig, "inspection"),
}
"""Each command is a frozen dataclass of its flags, and the module whose ``run`` takes it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 2."""
    try:
        import tyro
    except ModuleNotFoundError:
        print("error: the command line needs more packages: pip install ippro-tp[cli]", file=sys.stderr)
        return 2
    from . import settings

    if os.getcwd() not in sys.path:  # --library python: as with `python -m`, which an installed script is not
        sys.path.insert(0, os.getcwd())
    try:
        arguments = settings.expand(sys.argv[1:] if arguments is None else arguments)
        configs: dict[str, Callable[..., Any]] = {name: config for name, (config, _) in COMMANDS.items()}
        config = tyro.extras.subcommand_cli_from_dict(
            configs, prog="ippro-tp", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
        )
        module = next(module for kind, module in COMMANDS.values() if type(config) is kind)
        try:
            run = import_module(f".{module}", __package__).run
        except ModuleNotFoundError as error:
            raise UsageError(f"the command line needs {error.name}: pip install ippro-tp[cli]") from error
        run(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
