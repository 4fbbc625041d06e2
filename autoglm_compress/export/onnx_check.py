"""Whether onnxruntime-genai reads text as `transformers` does: texts in many scripts, special tokens, a chat."""

import tempfile
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint.tokenizer import load_tokenizer, sidecars
from autoglm_compress.errors import UserError
from autoglm_compress.export import onnx_engine
from autoglm_compress.export.chat_comparison import chat_problem
from autoglm_compress.export.engine_process import EngineError, ask_engine
from autoglm_compress.export.id_comparison import IdComparison, compare_with, require_alike
from autoglm_compress.export.onnx_families import graph_family
from autoglm_compress.export.onnx_names import GRAPH, SETTINGS
from autoglm_compress.hashing import key_of, sha256

_COMPARED: dict[str, IdComparison] = {}
"""What this process compared, by tokenizer: it is asked for before a run begins, and by every export of the run."""


def compare_ids(shape: ModelShape, folder: Path) -> IdComparison:
    """Let onnxruntime-genai read texts beside the tokenizer of `transformers`, once for the same files.

    Args:
        shape: the model's.
        folder: the model's, with a tokenizer.

    Raises:
        UserError: the engine does not take the tokenizer, or gives other ids for more than blanks.
    """
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sidecars(folder)}
    key = key_of([shape.family.architecture, files])
    if key not in _COMPARED:
        _COMPARED[key] = _compare(shape, load_tokenizer(folder), str(folder))
    return _COMPARED[key]


def _compare(shape: ModelShape, tokenizer: Any, where: str) -> IdComparison:
    try:
        compared = compare_with(tokenizer, lambda texts: _ask(shape, tokenizer, {"texts": texts}))
    except EngineError as error:
        raise UserError(f"{where}: onnxruntime-genai does not take the tokenizer: {error}.") from None
    require_alike(tokenizer, compared, where, "onnxruntime-genai", "ONNX")
    return compared


def chat_prompt_problem(shape: ModelShape, tokenizer: Any) -> str | None:
    """What onnxruntime-genai makes of the chat template that `transformers` does not; None if nothing."""
    return chat_problem(tokenizer, "onnxruntime-genai", lambda chat: str(_ask(shape, tokenizer, {"chat": chat})))


def _ask(shape: ModelShape, tokenizer: Any, job: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        _write_stub(shape, tokenizer, Path(folder))
        return ask_engine(onnx_engine.__name__, job | {"folder": folder})


def _write_stub(shape: ModelShape, tokenizer: Any, folder: Path) -> None:
    """A model without layers, which is enough to load a tokenizer."""
    import onnx_ir as ir

    size = ir.Shape(["batch", "tokens"])
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=size)
    cast = ir.node("Cast", [ids], {"to": int(ir.DataType.FLOAT)}, name="cast")
    logits = cast.outputs[0]
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(ir.DataType.FLOAT), size
    graph = ir.Graph([ids], [logits], nodes=[cast], opset_imports={"": 17}, name="graph")
    ir.save(ir.Model(graph, ir_version=10), folder / GRAPH)
    decoder = {
        "filename": GRAPH,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_hidden_layers": 0,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    }
    model = {"type": graph_family(shape).model_type, "vocab_size": shape.vocab_size, "context_length": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    write_json(folder / SETTINGS, {"model": model | tokens | {"decoder": decoder}, "search": {"max_length": 1}})
    tokenizer.save_pretrained(folder)
