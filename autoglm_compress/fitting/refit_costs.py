"""Memory and disk that a refit takes, from shapes alone."""

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import BATCH_TOKENS
from autoglm_compress.forward.logits import LOGITS_AT_ONCE

FP32 = 4


def refit_memory(shape: ModelShape, *, layer_passes: int, logit_passes: int) -> int:
    """Bytes of the most that a step holds: sums over tokens, a layer and its gradients, or a head and its gradient."""
    needed = 0
    for rows, columns in shape.layer_linears().values():
        # Sums over the tokens of the widest fit, twice, its factor, and the weight before and after.
        needed = max(needed, 4 * columns**2 + 5 * rows * columns)
    layer, head = shape.layer_bytes() // shape.element_bytes, shape.vocab_size * shape.hidden_size
    fits = needed + layer
    activations = BATCH_TOKENS * (10 * shape.hidden_size + 5 * shape.intermediate_size)
    whole_layer = 3 * layer + activations if layer_passes or shape.tie_word_embeddings else 0
    to_logits = 0
    if logit_passes:
        to_logits = 5 * LOGITS_AT_ONCE + (head + whole_layer if shape.tie_word_embeddings else 3 * head)
    return FP32 * max(fits, whole_layer, to_logits)


def refit_scratch(shape: ModelShape, source: ModelShape, tokens: int) -> int:
    """Bytes of disk for three buffers of hidden states of each of the two models, fp32."""
    return 3 * FP32 * tokens * (shape.hidden_size + source.hidden_size)
