"""Fitting the remaining weights to the original model's outputs."""
