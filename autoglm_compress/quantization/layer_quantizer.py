"""Quantizing the linears of one layer: smoothing scales, grids, and rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization.awq import Choice, sampled_rows, search_scale
from autoglm_compress.quantization.error_feedback import Feedback, feedback_of, refit_scales, round_with_feedback
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
    """A layer's quantized linears and its other tensors, by names relative to it, and the decisions."""

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
        errors[name] = _relative(linears[name].values(weight.dtype).sub_(weight), weight.norm())
    return QuantizedLayer(linears, _others(weights, schemes), {"weight_error": errors})


class LayerQuantizer:
    """Quantizes the smoothing pairs of a layer one by one, in the order in which the layer runs.

    Args:
        weights: the layer's tensors, by names relative to it. The tensors are not changed, but the linears' tensors are
            removed from the dictionary to free memory.
        schemes: how to quantize each linear; the readers of a pair share a scheme.
        dtypes: the dtypes that the layer's tensors are stored in.
        scale_dtype: that of the grids' scales.
        error_feedback: whether later features correct the error of rounding earlier ones.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        dtypes: Mapping[str, torch.dtype],
        scale_dtype: torch.dtype,
        *,
        error_feedback: bool,
    ) -> None:
        self._weights = weights
        self._schemes = schemes
        self._dtypes = dtypes
        self._scale_dtype = scale_dtype
        self._error_feedback = error_feedback
        self._linears: dict[str, QuantizedLinear] = {}
        self._pairs: dict[str, dict[str, Any]] = {}
        self._weight_errors: dict[str, float] = {}

    def quantize(self, pair: Pair, inputs: InputStatistics) -> dict[str, torch.Tensor]:
        """Scale, clip and round the readers of a pair so that their outputs on the measured inputs change little.

        The producer is divided by the scale, even if it is a linear that is already rounded.

        Returns:
            By reader, the weight [out, in] it computes with on inputs that are not divided by the scale.
        """
        absolute, scheme = inputs.absolute, self._schemes[pair.readers[0]]
        measure: Feedback | InputStatistics = feedback_of(inputs.whole_gram()) if self._error_feedback else inputs
        weights = [self._weights.pop(f"{reader}.weight") for reader in pair.readers]
        choice = search_scale(weights, absolute, measure, pair, scheme, self._scale_dtype)
        columns = pair.spread(self._fold(pair, choice.candidate.scale))
        stacked, rows = _stacked(weights)
        dtype = stacked.dtype
        del weights
        stacked = stacked * columns
        measure = measure.scaled(columns)
        rounded = _round(stacked, scheme, self._scale_dtype, measure)
        found, deltas = {}, []
        for reader, part in zip(pair.readers, rows, strict=True):
            linear = self._linears[reader] = QuantizedLinear(rounded.integers[part], rounded.grid.rows(part))
            values = linear.values(self._scale_dtype).to(stacked.dtype)
            size, delta = stacked[part].norm(), stacked[part].sub_(values)
            self._weight_errors[reader] = _relative(delta, size)
            deltas.append(sampled_rows(delta))
            found[reader] = values.div_(columns).to(dtype)
        error = float(measure.output_error(torch.cat(deltas))) / choice.size
        self._pairs[pair.producer] = _summary(choice) | {"output_error": _compact(error)}
        return found

    def _fold(self, pair: Pair, scale: torch.Tensor) -> torch.Tensor:
        """Divide the producer of a pair by a scale [channels], where it can be stored. Returns the applied scale."""
        linear = self._linears.get(pair.producer)
        name = f"{pair.producer}.{'bias' if linear else 'weight'}"
        vector = self._weights.get(name)
        folded = fold(pair, scale, vector, self._dtypes.get(name), linear.grid if linear else None)
        if folded.vector is not None:
            self._weights[name] = folded.vector
        if linear and folded.grid:
            self._linears[pair.producer] = QuantizedLinear(linear.integers, folded.grid)
        return folded.scale

    def result(self) -> QuantizedLayer:
        """The quantized layer. All pairs must be quantized before."""
        decisions = {"pairs": self._pairs, "weight_error": self._weight_errors}
        return QuantizedLayer(self._linears, self._weights, decisions)


def _stacked(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[slice]]:
    """Weights [out, in] of one input as one, and the rows of each."""
    stops = list(accumulate(len(weight) for weight in weights))
    rows = [slice(stop - len(weight), stop) for stop, weight in zip(stops, weights, strict=True)]
    return weights[0] if len(weights) == 1 else torch.cat(list(weights)), rows


def _round(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, measure: Feedback | InputStatistics
) -> QuantizedLinear:
    """Round a weight [out, in] so that the outputs change little."""
    if isinstance(measure, Feedback):
        grid = clipped_grid(weight, scheme, scale_dtype, measure.conditional)
        integers = round_with_feedback(weight, grid, measure)
        return QuantizedLinear(integers, refit_scales(weight, integers, grid, measure))
    grid = clipped_grid(weight, scheme, scale_dtype, measure.squares)
    return QuantizedLinear(grid.integers(weight), grid)


def _others(weights: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name.removesuffix(".weight") not in schemes}


def _relative(delta: torch.Tensor, size: torch.Tensor) -> float:
    return _compact(delta.norm() / size.clamp(min=1e-30))


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
