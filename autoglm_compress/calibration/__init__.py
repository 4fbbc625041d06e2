"""Calibration text: where it comes from and how it is cut into sequences."""
