"""Time of a forward pass: measured op by op on this machine, predicted for any widths."""

from .table import LatencyTable

__all__ = ["LatencyTable"]
