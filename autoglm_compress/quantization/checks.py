"""Checks of the options of quantizing for a model, and warnings, before anything runs."""

from importlib.metadata import version
from importlib.util import find_spec

from autoglm_compress.architecture import ModelShape, Scheme
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.errors import PlanError
from autoglm_compress.quantization.bit_allocation import FEW, MANY
from autoglm_compress.quantization.loading_probe import transformers_loads
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.quantization.smoothing import smoothing_pairs

GROUP_SIZES = (128, 64, 32)


def check_options(options: QuantizationOptions, shape: ModelShape) -> None:
    """Raise PlanError if a model of this shape cannot be quantized with these options."""
    if shape.quantization is not None:
        message = "a quantized checkpoint cannot be quantized again: set `from:` to a stage that is not quantized"
        raise PlanError("stage", message)
    if (options.bits == "auto") is (options.budget is None):
        raise PlanError("budget", "`bits: auto` needs a budget, {bytes: …} or {average_bits: …}; other bits take none")
    _check_towers(options, shape)
    _check_group_size(options.group_size, shape)
    _check_format(options, shape)
    _check_backend(options, shape)
    _check_method(options, shape)


def _check_towers(options: QuantizationOptions, shape: ModelShape) -> None:
    known = [tower.name for tower in shape.kept]
    for name in options.towers:
        if name not in known:
            has = f"has the towers {', '.join(known)}" if known else "has no towers beside the text"
            raise PlanError("towers", f"{name}: {shape.family.architecture} {has}")
    if options.towers and options.format == AWQ:
        raise PlanError("towers", "awq holds 4 bits: use compressed-tensors")


def _check_group_size(group_size: int, shape: ModelShape) -> None:
    features = {name: size for layer in shape.kinds_of_layers for name, (_, size) in shape.layer_linears(layer).items()}
    bad = {linear: columns for linear, columns in features.items() if columns % max(group_size, 1)}
    if bad:
        fit = [str(size) for size in GROUP_SIZES if not any(columns % size for columns in features.values())]
        linear, columns = next(iter(bad.items()))
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise PlanError(
            "group_size",
            f"{group_size} does not divide the {columns} input features of {linear}{others}; sizes that do "
            f"for all linears: {', '.join([*fit, '-1'])} (-1 is one scale per output)",
        )


def _check_format(options: QuantizationOptions, shape: ModelShape) -> None:
    if options.head_bits == MANY and shape.tie_word_embeddings:
        raise PlanError("head_bits", "8: no loader takes a quantized matrix that is embedding and head at once")
    if options.symmetric is False and (options.bits == "auto" or options.head_bits == MANY):
        raise PlanError(
            "symmetric",
            "false: transformers reads zero points correctly only if all linears have the same bits: not with "
            "`bits: auto` or `head_bits: 8`",
        )
    if options.format != AWQ:
        _check_zero_points(options)
        return
    if options.bits != FEW or options.symmetric or options.head_bits == MANY:
        raise PlanError("format", "awq holds 4 bits, asymmetric, and a 16-bit head: use compressed-tensors")
    if bad := [name for name, (rows, _) in shape.linear_shapes() if rows % 8]:
        raise PlanError(
            "format", f"awq packs eight outputs into one integer, and 8 does not divide the outputs of {bad[0]}"
        )


def _check_zero_points(options: QuantizationOptions) -> None:
    if options.symmetric is not False or options.bits == "auto":
        return
    if not transformers_loads(Scheme(options.bits, options.group_size, symmetric=False)):
        other = "use `format: awq`, which holds zero points" if options.bits == FEW else "leave it out"
        raise PlanError(
            "symmetric",
            f"false: transformers {version('transformers')}, which is installed, does not load zero points in "
            f"compressed-tensors: {other}",
        )


def _check_method(options: QuantizationOptions, shape: ModelShape) -> None:
    """AWQ works on smoothing pairs, and so does the choice of bits."""
    if not options.looks_at_activations:
        return
    for layer in shape.kinds_of_layers:
        readers = {reader for pair in smoothing_pairs(shape, layer) for reader in pair.readers}
        if alone := [linear for linear in shape.layer_linears(layer) if linear not in readers]:
            raise PlanError(
                "method",
                f"{options.method}: the family {shape.family.architecture} does not say in `smoothing` what produces "
                f"the inputs of {', '.join(alone)}: use round_to_nearest, without `bits: auto`",
            )


def _check_backend(options: QuantizationOptions, shape: ModelShape) -> None:
    if options.backend == "own":
        return
    if shape.family.kept:
        raise PlanError("backend", f"autoawq does not know {shape.family.architecture}: leave it out")
    if options.format != AWQ or options.method != "awq":
        raise PlanError("backend", "autoawq does `method: awq` and writes `format: awq` alone")
    if find_spec("awq") is None:
        raise PlanError("backend", "autoawq is not installed: pip install 'autoglm-compress[autoawq]'")


def loader_warnings(options: QuantizationOptions) -> list[str]:
    """Warnings about results that some loaders do not load."""
    found = []
    if options.head_bits == MANY:
        found.append(
            "a quantized head: transformers loads it, vLLM since March 2026; other engines may silently ignore it, "
            "so check what they generate"
        )
    if options.towers:
        found.append(
            "quantized towers: transformers unpacks them when the whole model is first called, which generate does "
            "after it has called the towers: call the model once with a token before you generate"
        )
    return found
