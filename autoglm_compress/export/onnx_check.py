"""Whether onnxruntime-genai reads text as `transformers` does: texts in many scripts, special tokens, a chat."""

import tempfile
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint.tokenizer import load_tokenizer, sidecars
from autoglm_compress.errors import UserError
from autoglm_compress.export import onnx_engine
from autoglm_compress.export.engine_process import EngineError, ask_engine
from autoglm_compress.export.id_comparison import IdComparison, compare_with
from autoglm_compress.export.onnx_families import graph_family
from autoglm_compress.export.onnx_names import GRAPH, SETTINGS
from autoglm_compress.hashing import key_of, sha256

CHAT = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "What is 7 × 6?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": " Thank you!\n"},
]


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
    wrong = [number for number in compared.differing() if not _alike_but_for_blanks(tokenizer, compared, number)]
    if wrong:
        raise UserError(
            f"{where}: onnxruntime-genai's tokenizer gives other ids for {len(wrong)} of {len(compared.texts)} texts, "
            f"such as {compared.example(wrong[0])}. "
            "The model would read nonsense: it cannot be exported to ONNX with this tokenizer."
        )
    return compared


def _alike_but_for_blanks(tokenizer: Any, compared: IdComparison, number: int) -> bool:
    """Whether two readings have the same text, and the same tokens but for those of spaces and line breaks.

    The engine does not go back where `\\s*[\\r\\n]+` has read too much, as the expressions of many tokenizers ask for.
    """
    ours, theirs = compared.expected[number], compared.found[number]
    if tokenizer.decode(ours) != tokenizer.decode(theirs):
        return False
    rest = [[token for token in ids if not tokenizer.decode([token]).isspace()] for ids in (ours, theirs)]
    return rest[0] == rest[1]


def blanks_problem(compared: IdComparison) -> str | None:
    """What to know of blanks that the engine reads as other tokens; None if there are none."""
    if not (differing := compared.differing()):
        return None
    return (
        f"onnxruntime-genai reads runs of spaces and line breaks as other tokens in {len(differing)} of "
        f"{len(compared.texts)} texts, such as {compared.texts[differing[0]][:40]!r}"
    )


def chat_problem(shape: ModelShape, tokenizer: Any) -> str | None:
    """What onnxruntime-genai makes of the chat template that `transformers` does not; None if nothing."""
    if not tokenizer.chat_template:
        return None
    try:
        expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template may refuse a chat with whatever exception: other chats are not known here
        return None
    try:
        found = _ask(shape, tokenizer, {"chat": CHAT})
    except EngineError as error:
        return f"onnxruntime-genai does not take the chat template ({error}): write prompts without it"
    return None if found == expected else "onnxruntime-genai writes another prompt by the chat template: write prompts"


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
