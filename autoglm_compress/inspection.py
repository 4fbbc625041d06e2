"""The description of a checkpoint, as text and as JSON."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autoglm_compress.architecture import Family, UnsupportedArchitectureError, require_used
from autoglm_compress.architecture.family_draft import draft_family
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.plain_verdict import plain_verdict
from autoglm_compress.checkpoint.unknown_model import known_model
from autoglm_compress.errors import UserError, listed
from autoglm_compress.records.stage import Shape
from autoglm_compress.report.numbers import human


def inspect_checkpoint(folder: Path, family: Family | None = None) -> dict[str, Any]:
    """Family, shape, parameters by part, bytes by dtype, and whether plain transformers can load it.

    `family` is as `Checkpoint` takes it.

    Raises:
        UserError: the folder is not a complete checkpoint of a supported family. Of an unknown architecture it says
            which fields of a family's YAML could be filled.
    """
    try:
        checkpoint = Checkpoint(folder, family)
    except UnsupportedArchitectureError as error:
        raise UserError(f"{error}\n{_drafted(folder)}") from None
    require_used(family, checkpoint.family, "--family", str(folder / "config.json"))
    dtypes: Counter[str] = Counter()
    for info in checkpoint.infos.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
    try:
        checkpoint.require_tokenizer()
        tokenizer = True
    except UserError:
        tokenizer = False
    return {
        "folder": str(folder),
        "shape": Shape.of(checkpoint.shape).as_data(),
        "parameters": checkpoint.shape.parameters,
        "unique_parameters": checkpoint.shape.unique_parameters,
        "parameters_by_part": checkpoint.shape.parameters_by_part(),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dict(dtypes),
        "files": [path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.files()],
        "tokenizer": tokenizer,
        "left_out": list(checkpoint.left_out),
        "auto_class": checkpoint.family.auto_class,
        "transformers": plain_verdict(checkpoint),
    }


def _drafted(folder: Path) -> str:
    """The family's YAML as far as it can be drafted, or why it cannot."""
    try:
        return str(draft_family(known_model(folder)))
    except UserError as error:
        return f"No family's YAML can be drafted for it: {error}"


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect_checkpoint` found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in found["shape"].items():
        if name == "quantization" and value is not None:
            value = _quantization(value)
        table.add_row(name, str(value))
    for part, count in found["parameters_by_part"].items():
        table.add_row(f"parameters: {part}", f"{human(count)} ({count / found['parameters']:.1%})")
    table.add_row("parameters", human(found["parameters"]))
    if found["unique_parameters"] != found["parameters"]:
        table.add_row("parameters, shared adapter once", human(found["unique_parameters"]))
    files = found["files"]
    table.add_row("bytes", f"{human(found['bytes'])}B in {files[0] if len(files) == 1 else f'{len(files)} files'}")
    table.add_row(
        "bytes by dtype", ", ".join(f"{name} {human(size)}B" for name, size in found["bytes_by_dtype"].items())
    )
    table.add_row("tokenizer", "yes" if found["tokenizer"] else "no")
    if found["left_out"]:
        table.add_row("left out", f"{listed(found['left_out'])}, which the model does not use")
    table.add_row("loading class", found["auto_class"])
    verdict = found["transformers"]
    needs = _needs(found["shape"]["quantization"])
    says = f"loads it{needs}" if verdict["loads"] else f"cannot load it: {verdict['reason']}"
    table.add_row("plain transformers", says)
    console.print(table)


def _quantization(found: dict[str, Any]) -> str:
    """The quantization of a checkpoint in a line."""
    bits = found["bits"] if isinstance(found["bits"], list) else [found["bits"]]
    sizes = _by_value(found["group_sizes"])
    kind = "symmetric" if found["symmetric"] else "asymmetric"
    by_bits = f" ({_by_value(found['bits_by_linear'])})" if len(bits) > 1 else ""
    names = " and ".join(f"INT{number}" for number in bits)
    return f"{names}{by_bits}, {kind}, {found['format']}, group size {sizes}"


def _by_value(values: dict[str, int | list[int]]) -> str:
    """The value if all linears share it, otherwise each value with its linears. A list differs between layers."""
    linears: dict[str, list[str]] = {}
    for linear, value in values.items():
        spelled = " or ".join(map(str, value)) if isinstance(value, list) else str(value)
        linears.setdefault(spelled, []).append(linear.rpartition(".")[2])
    if len(linears) == 1:
        return next(iter(linears))
    return ", ".join(f"{value}: {' '.join(names)}" for value, names in linears.items())


def _needs(quantization: dict[str, Any] | None) -> str:
    """The package that transformers needs to load a quantized checkpoint."""
    if quantization is None:
        return ""
    if quantization["format"] == AWQ:
        return ", with the gptqmodel package"
    if not quantization["symmetric"]:
        return ", with CompressedTensorsConfig(dequantize=True)"
    return ", with the compressed-tensors package"
