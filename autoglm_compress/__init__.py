"""Compress large language models, layer by layer, into ones that fit a phone."""
