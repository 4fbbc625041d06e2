"""Quantizing the linears of one layer: scales between neighbours, grids, and rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization.awq import Choice, sampled_rows, search_scale
from autoglm_compress.quantization.error_feedback import Feedback, feedback_of, round_with_feedback
from autoglm_compress.quantization.grid import Grid, clipped_grid, grid_for
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.smoothing import Pair, fold


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight as int8 integers [out, in] on a grid."""

    integers: torch.Tensor
    grid: Grid

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that an engine computes with."""
        return self.grid.values(self.integers, dtype)


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's quantized linears, its other tensors, by names relative to it, and what was decided."""

    linears: dict[str, QuantizedLinear]
    others: dict[str, torch.Tensor]
    decisions: dict[str, Any]


def round_layer(
    weights: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> QuantizedLayer:
    """Round a layer's weights (fp32, by names relative to it) to the nearest values, without looking at inputs."""
    linears, errors = {}, {}
    for name, scheme in schemes.items():
        weight = weights[f"{name}.weight"]
        grid = grid_for(weight, scheme, scale_dtype)
        linears[name] = QuantizedLinear(grid.integers(weight), grid)
        errors[name] = _relative(linears[name].values(weight.dtype).sub_(weight), weight)
    return QuantizedLayer(linears, _others(weights, schemes), {"weight_error": errors})


def quantize_layer(
    weights: dict[str, torch.Tensor],
    inputs: dict[str, InputStatistics],
    pairs: Sequence[Pair],
    schemes: Mapping[str, Scheme],
    dtypes: Mapping[str, torch.dtype],
    scale_dtype: torch.dtype,
    *,
    error_feedback: bool,
) -> QuantizedLayer:
    """Scale, clip and round a layer's linears so that their outputs on the measured inputs change little.

    Args:
        weights: the layer's tensors, by names relative to it. The tensors stay as they are, but the dictionary loses
            those of the linears, for they take much memory.
        inputs: what the readers of each pair read, by the pair's producer; emptied as well.
        pairs: the layer's smoothing pairs; the readers of a pair share a scheme.
        schemes: how to quantize each linear.
        dtypes: the dtypes that the layer's tensors are stored in.
        scale_dtype: that of the grids' scales.
        error_feedback: whether what rounding a feature does is made up for by those after it.
    """
    linears: dict[str, QuantizedLinear] = {}
    found, weight_errors = {}, {}
    # From the last, so that the rows of a producer are divided by its scale before it is rounded itself.
    for pair in reversed(pairs):
        measure, scheme = inputs.pop(pair.producer), schemes[pair.readers[0]]
        absolute = measure.absolute
        if error_feedback:
            measure = feedback_of(measure.whole_gram())
        readers = [weights[f"{reader}.weight"] for reader in pair.readers]
        choice = search_scale(readers, absolute, measure, pair, scheme, scale_dtype)
        folded, scale = fold(weights, pair, choice.candidate.scale, dtypes)
        weights |= folded
        del readers, folded
        stacked, rows = _stacked([weights.pop(f"{reader}.weight") for reader in pair.readers])
        measure = measure.scaled(pair.spread(scale))
        rounded = _round(stacked, scheme, scale_dtype, measure)
        deltas = []
        for reader, part in zip(pair.readers, rows, strict=True):
            linears[reader] = QuantizedLinear(rounded.integers[part], rounded.grid.rows(part))
            delta = linears[reader].values(stacked.dtype).sub_(stacked[part])
            weight_errors[reader] = _relative(delta, stacked[part])
            deltas.append(sampled_rows(delta))
        error = float(measure.output_error(torch.cat(deltas))) / choice.size
        found[pair.producer] = _summary(choice) | {"output_error": _compact(error)}
    decisions = {"pairs": {pair.producer: found[pair.producer] for pair in pairs}, "weight_error": weight_errors}
    return QuantizedLayer(linears, weights, decisions)


def _stacked(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[slice]]:
    """Weights [out, in] of one input as one, and the rows of each."""
    stops = list(accumulate(len(weight) for weight in weights))
    rows = [slice(stop - len(weight), stop) for stop, weight in zip(stops, weights, strict=True)]
    return weights[0] if len(weights) == 1 else torch.cat(list(weights)), rows


def _round(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, measure: Feedback | InputStatistics
) -> QuantizedLinear:
    """Round a weight [out, in] by what its errors do to the outputs."""
    if isinstance(measure, Feedback):
        grid = clipped_grid(weight, scheme, scale_dtype, measure.conditional)
        return QuantizedLinear(round_with_feedback(weight, grid, measure), grid)
    grid = clipped_grid(weight, scheme, scale_dtype, measure.squares)
    return QuantizedLinear(grid.integers(weight), grid)


def _others(weights: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name.removesuffix(".weight") not in schemes}


def _relative(delta: torch.Tensor, weight: torch.Tensor) -> float:
    return _compact(delta.norm() / weight.norm().clamp(min=1e-30))


def _summary(choice: Choice) -> dict[str, Any]:
    return {
        "alpha": choice.candidate.alpha,
        "weight_term": choice.candidate.weight_term,
        "error_rounding": _compact(choice.error_rounding),
        "error": _compact(choice.error),
        "error_ratio": _compact(choice.error / choice.error_rounding if choice.error_rounding else 1.0),
    }


def _compact(value: torch.Tensor | float) -> float:
    return float(f"{float(value):.4g}")
