"""Memory and disk that a refit takes, from shapes alone."""

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.divided_rows import deciding_rows
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.forward.costs import (
    FP32,
    head_elements,
    largest_of_layer,
    layer_memory,
    pass_memory,
    reading_memory,
    seeing_memory,
    training_memory,
    walk_memory,
)
from autoglm_compress.forward.logits import logits_memory
from autoglm_compress.slices import SLICE_ROWS

HEAD_SAMPLE = 4096
"""Rows of the head that decide how all of it is fitted; an even choice of so many at least, and fewer than twice."""
BRIDGE_TOKENS = 4096
"""Tokens, about, of images and sounds that linears of towers are fitted to and decided by."""
FIT_COPIES = 6
"""Weights that `fit` holds: what is missing, the solution, the sum, those of the strength before and the best, and the
prior where that is put together of several."""


def refit_memory(
    shape: ModelShape, source: ModelShape, calibration: CalibrationOptions, *, layer_passes: int, logit_passes: int
) -> int:
    """Bytes of the most that a step holds: a layer of both models and a fit or gradients, or the head and those."""
    tokens = calibration.batch_tokens
    # Of each of a model's three buffers (before, in the middle of and after a layer) a batch is resident.
    states = 3 * FP32 * tokens * (shape.hidden_size + source.hidden_size)
    ours, original = layer_memory(shape), layer_memory(source)
    passing = max(pass_memory(model, tokens) for model in (shape, source))
    step = original + max(_fits_memory(shape, source, calibration), passing, reading_memory(source))
    if layer_passes:
        step = max(step, original + _layer_descent_memory(shape, source, tokens))
    if logit_passes and shape.tie_word_embeddings:  # without the original's layer
        heads = sum(model.element_bytes * head_elements(model) for model in (shape, source))
        step = max(step, heads + _layer_descent_memory(shape, source, tokens) + logits_memory(tokens, shape.vocab_size))
    head = 0 if shape.tie_word_embeddings else _head_memory(shape, source, calibration, logit_passes)
    return max(ours + states + step, head, walk_memory(source, tokens))


def bridges_memory(shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> int:
    """Bytes while towers see, those of one model at a time, or of the largest fit of their linears after it."""
    if shape.hidden_size == source.hidden_size:
        return seeing_memory(source)
    tokens, largest, weights = min(calibration.tokens, BRIDGE_TOKENS), 0, 0
    for rows, columns in (tensor.shape for tower in shape.kept for tensor in tower.tensors if tensor.is_fitted):
        weights += rows * columns
        # Targets in all directions and in those that are left, inputs and the same with a constant, each once more
        # weighted; sums over them; and what solving takes.
        given = 2 * tokens * (columns + rows) + tokens * source.hidden_size
        sums = 2 * min((columns + 1) * (columns + 1 + rows), tokens * (columns + 1 + rows))
        solving = 2 * min(columns + 1, tokens) ** 2 + FIT_COPIES * rows * (columns + 1)
        largest = max(largest, given + sums + solving)
    return max(seeing_memory(source), FP32 * (largest + weights))


def _fits_memory(shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> int:
    """Bytes of the largest fit: of linears that read one input, or of one that writes to the residual stream."""
    linears = shape.layer_linears()
    found = 0
    for readers in shape.family.norm_readers.values():
        rows = sum(linears[reader][0] for reader in readers if reader in linears)
        found = max(found, _reader_fit(rows, shape.hidden_size, source.hidden_size, calibration))
    for writer in (shape.family.attention_output, shape.family.mlp_output):
        rows, columns = linears[writer]
        train, deciding = (
            min(columns**2 + rows * columns, tokens * (columns + rows))
            for tokens in _fitted_to_and_deciding(calibration)
        )
        # While sums are taken: the inputs, those of some rows, the same weighted, and five times the targets.
        summing = calibration.batch_tokens * (3 * columns + 5 * rows)
        solving = 2 * min(columns, calibration.tokens) ** 2 + (FIT_COPIES - 1) * rows * columns
        found = max(found, FP32 * (train + deciding + max(summing, solving)))
    return found


def _reader_fit(rows: int, columns: int, other: int, calibration: CalibrationOptions) -> int:
    """Bytes of a fit of linears [rows, columns] to those of the original [rows, other]: `InputMoments` and `fit`.

    Sums over the tokens that are fitted to and over those that decide, or the tokens, if they are fewer; the same for
    targets, which are there twice while they are put together; a damped Gram matrix and its factor; and weights.
    """
    train, deciding = _fitted_to_and_deciding(calibration)
    sums = min(columns * (columns + other), train * (columns + other))
    sums += min(columns * (columns + other) + other**2, deciding * (columns + other))
    crosses = rows * (min(columns, train) + min(columns, deciding))
    return FP32 * (sums + crosses + 2 * rows * other + 2 * min(columns, train) ** 2 + FIT_COPIES * rows * columns)


def _fitted_to_and_deciding(calibration: CalibrationOptions) -> tuple[int, int]:
    deciding = deciding_rows(calibration.samples) * calibration.sequence_length
    return calibration.tokens - deciding, deciding


def _layer_descent_memory(shape: ModelShape, source: ModelShape, tokens: int) -> int:
    """Bytes beside the models' layers: the weights before and gradients, with a batch's graph or the better weights.

    A batch is copied from both streams, and the target is projected, weighted and squared.
    """
    layer = layer_memory(shape)
    batch = FP32 * tokens * (3 * shape.hidden_size + source.hidden_size)
    kept = layer * shape.element_bytes // FP32
    return layer + kept + max(batch + training_memory(shape, tokens), layer, FP32 * largest_of_layer(shape))


def _head_memory(shape: ModelShape, source: ModelShape, calibration: CalibrationOptions, logit_passes: int) -> int:
    """Bytes of the fit of a head that is not the embedding, when the layers are let go of."""
    ours, original = (model.element_bytes * head_elements(model) for model in (shape, source))
    rows = min(2 * HEAD_SAMPLE, SLICE_ROWS, shape.vocab_size)
    ridge = 2 * ours + original + _reader_fit(rows, shape.hidden_size, source.hidden_size, calibration)
    if not logit_passes:
        return ridge
    tokens = calibration.batch_tokens
    # The head and its gradient in fp32; a batch of both streams, as copied, as normalised and on the way there.
    trained = 2 * FP32 * head_elements(shape) + FP32 * 4 * tokens * (shape.hidden_size + source.hidden_size)
    slices = FP32 * min(SLICE_ROWS, shape.vocab_size) * source.hidden_size
    descent = ours + original + trained + slices + logits_memory(tokens, shape.vocab_size)
    return max(ridge, descent)


def refit_scratch(shape: ModelShape, source: ModelShape, tokens: int) -> int:
    """Bytes of disk for three buffers of hidden states of each of the two models, fp32."""
    return 3 * FP32 * tokens * (shape.hidden_size + source.hidden_size)
