"""Reading weights, as the command line of the package does it."""

from ippro_tp.cli.weights import fingerprint, load_checkpoint, read_state_dict

__all__ = ["fingerprint", "load_checkpoint", "read_state_dict"]
