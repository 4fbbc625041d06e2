"""Choosing which layers, heads, neurons and channels go, and cutting tensors accordingly."""
