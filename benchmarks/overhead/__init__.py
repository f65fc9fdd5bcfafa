"""What calibration, scoring and compensation cost."""
