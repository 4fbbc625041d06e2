"""Weight-only quantization of the decoder layers: rounding, smoothing pairs and the AWQ scale search."""
