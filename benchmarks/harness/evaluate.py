"""Accuracy, and BatchNorm re-estimation after pruning, as the command line of the package does it."""

from ippro_tp.cli.evaluate import accuracy, reestimate_batchnorm

__all__ = ["accuracy", "reestimate_batchnorm"]
