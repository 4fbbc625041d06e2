"""Rounding all layers to the nearest values, without calibration tokens."""

from autoglm_compress.quantization.layer_quantizer import round_layer
from autoglm_compress.quantization.writing import LayerWriter
from autoglm_compress.runtime import Runtime


def round_layers(writer: LayerWriter, runtime: Runtime) -> None:
    """Round the layers that are not written yet."""
    source, layers = writer.source, writer.source.shape.num_hidden_layers
    with runtime.progress.task("quantize", total=layers, unit="layers") as advance:
        for layer in range(layers):
            if not writer.target.has(1 + layer):
                weights = {k: w.to(runtime.device).float() for k, w in source.read_layer(layer).items()}
                schemes = writer.quantization.in_layer(source.family.layer_prefix(layer))
                writer.write(layer, round_layer(weights, schemes, writer.scale_dtype))
            advance(1)
