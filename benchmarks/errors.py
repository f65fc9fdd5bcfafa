"""The one exception that the command lines turn into a message and exit code 2."""

from ippro_tp.cli.errors import UsageError

__all__ = ["UsageError"]
