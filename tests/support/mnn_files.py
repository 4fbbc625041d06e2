"""What MNN makes of the linears in an export to it, one at a time."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoglm_compress.export.mnn_names import GRAPH, WEIGHTS


def _convert(kind: str, source: Path, option: str, target: Path) -> None:
    import _tools

    _tools.mnnconvert(["", "-f", kind, "--modelFile", str(source), option, str(target)])


def graph(folder: Path) -> dict[str, Any]:
    """The graph of an export, as MNN writes it in JSON."""
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "graph.json"
        _convert("MNN", folder / GRAPH, "--JsonFile", file)
        return json.loads(file.read_text())


def linear(folder: Path, whole: dict[str, Any], module: str) -> torch.Tensor:
    """The matrix that the engine multiplies with for a module, fp32 [out, in]: what it makes of an identity."""
    name = "/lm/lm_head/Linear" if module == "lm_head" else f"/{module.replace('.', '/')}/Linear"
    found = next(op for op in whole["oplists"] if op["name"] == name)
    main = found["main"] | {"external": [*found["main"]["external"][:3], 0, 0]}  # without the bias
    columns = main["common"]["inputCount"]
    size = {"dims": [columns, columns, 1, 1], "dtype": "DT_FLOAT", "dformat": "NCHW"}
    ops = [
        {"name": "in", "type": "Input", "outputIndexes": [0], "main_type": "Input", "main": size},
        _rearranged("before", 0, "NCHW", "NC4HW4"),
        found | {"inputIndexes": [1], "outputIndexes": [2], "main": main},
        _rearranged("out", 2, "NC4HW4", "NCHW"),
    ]
    kept = {key: value for key, value in whole.items() if key in ("bizCode", "sourceType", "usage")}
    alone = kept | {"oplists": ops, "tensorName": ["in", "before", "product", "out"], "outputName": ["out"]}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "one.json"
        file.write_text(json.dumps(alone))
        _convert("JSON", file, "--MNNModel", file.with_suffix(".mnn"))
        return torch.from_numpy(_product(file.with_suffix(".mnn"), folder / WEIGHTS, columns))


def _rearranged(name: str, tensor: int, source: str, target: str) -> dict[str, Any]:
    main = {"source": source, "dest": target}
    places = {"inputIndexes": [tensor], "outputIndexes": [tensor + 1]}
    return {"name": name, "type": "ConvertTensor", "main_type": "TensorConvertInfo", "main": main} | places


def _product(file: Path, weights: Path, columns: int) -> np.ndarray:
    """What a model makes of an identity, transposed."""
    from MNN import expr, nn

    runtime = nn.create_runtime_manager(({"precision": "high", "memory": "high", "backend": "CPU", "numThread": 1},))
    runtime.set_external(str(weights))
    module = nn.load_module_from_file(str(file), ["in"], ["out"], runtime_manager=runtime)
    identity = np.eye(columns, dtype=np.float32).reshape(columns, columns, 1, 1)
    return np.array(module.forward([expr.const(identity, identity.shape, expr.NCHW)])[0].read()).reshape(columns, -1).T
