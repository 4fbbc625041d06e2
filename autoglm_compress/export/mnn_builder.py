"""MNN's converter in a process of its own, run as a module: it prints, and its packages have names such as `utils`.

A job comes as JSON on the standard input: `{"checkpoint", "family", "embedding_bits", "output"}`, or `{"tokenizer",
"output"}` for a tokenizer alone. The graph is traced and converted, and filled with one linear after another from the
checkpoint, so that one matrix is what is in memory. The files are in the folder `output` then, and the answer on the
standard output is what was rounded, as JSON.

Of `llmexport`, the operators that stand for linears and attention in a graph, what makes MNN's of them, and the
tokenizer's file are used; its own models and its command are not. Of MNN, `_tools` is called: `MNN.tools` installs a
package by pip and reports each use when it is imported.
"""

import hashlib
import json
import os
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import torch

from autoglm_compress.architecture import Family
from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.tokenizer import load_tokenizer
from autoglm_compress.export.mnn_families import row_order, whole_heads
from autoglm_compress.export.mnn_graph import Graph, Operators, trace
from autoglm_compress.export.mnn_names import EMBEDDINGS, GRAPH, MODEL_SETTINGS, SETTINGS, TOKENIZER, WEIGHTS
from autoglm_compress.export.mnn_sizes import group_of
from autoglm_compress.export.mnn_weights import LinearBytes, MatrixWriter, Roundings
from autoglm_compress.export.own_graphs import rope_frequencies
from autoglm_compress.export.text_models import has_window, sliding_window

NOTHING = ("quant_config", "gptq_path", "lora_path")
OFF = ("awq", "hqq", "omni", "smooth", "skip_weight", "tie_word_embeddings")
"""Options of `llmexport` that its converter looks at, and that are not used."""


def build(checkpoint: Checkpoint, output: Path, embedding_bits: int | None) -> Roundings:
    """Write a checkpoint for MNN into a folder, which is made; returns what was rounded, by tensor.

    Args:
        checkpoint: what to write.
        output: the folder.
        embedding_bits: 8 to round a 16-bit embedding and a 16-bit head, None for what they are.
    """
    from utils.custom_op import FakeLinear, FusedAttention

    output.mkdir(parents=True, exist_ok=True)
    os.chdir(output)  # the converter leaves a log where it is
    shape, masks = checkpoint.shape, windows(checkpoint)
    writer, operators = MatrixWriter(checkpoint, embedding_bits), Operators(FakeLinear, FusedAttention)
    frequencies, scaling = rope_frequencies(_plain_config(checkpoint), checkpoint.family.auto_class)
    traced = output / GRAPH.replace(".mnn", ".onnx")
    graph = Graph(checkpoint, operators, whole_heads(frequencies, shape.head_dim), scaling, masks)
    with torch.no_grad():
        trace(graph, shape, masks, traced)
    converter = _converter(operators, writer, output, 2 * len(frequencies))
    converter.export(str(traced))
    _name_by_content(output / GRAPH, output / f"{GRAPH}.json")
    head = shape.family.roles.head
    if shape.tie_word_embeddings:
        looked_up = converter.written[head].looked_up(writer.scheme(head))
    else:
        with (output / EMBEDDINGS).open("wb") as file:
            looked_up = writer.embedding(file)
    write_tokenizer(checkpoint.folder, output)
    write_json(output / SETTINGS, _settings())
    write_json(output / MODEL_SETTINGS, _model_settings(checkpoint, masks, looked_up))
    return writer.roundings


def write_tokenizer(folder: Path, output: Path) -> None:
    """Write the tokenizer of a model's folder for MNN."""
    from utils.tokenizer import LlmTokenizer

    LlmTokenizer.from_pretrained(str(folder), model_type="").export(str(output))


def build_stub(folder: Path, output: Path) -> None:
    """Write the tokenizer of a model's folder, and settings, for an engine that has no model."""
    write_tokenizer(folder, output)
    write_json(output / SETTINGS, _settings())
    write_json(output / MODEL_SETTINGS, _engine_settings(8, 1, masked=False) | _chat_settings(load_tokenizer(folder)))


def _settings() -> dict[str, Any]:
    """How the engine runs the model, if nobody says otherwise: activations in 8 bits, as fast as it can."""
    return {
        "llm_model": GRAPH,
        "llm_weight": WEIGHTS,
        "embedding_file": EMBEDDINGS,
        "tokenizer_file": TOKENIZER,
        "backend_type": "cpu",
        "thread_num": 4,
        "precision": "low",
        "memory": "low",
        "sampler_type": "greedy",
    }


def _model_settings(checkpoint: Checkpoint, masks: tuple[int, ...], looked_up: list[int] | None) -> dict[str, Any]:
    """What the engine has to know of the model beside its graph."""
    config, shape = checkpoint.model_config, checkpoint.shape
    found = {"model_type": config.model_type}
    found |= _engine_settings(shape.hidden_size, shape.num_hidden_layers, masked=bool(masks))
    if masks:
        found["sliding_window"] = sliding_window(config)
    if looked_up:
        found["tie_embeddings"] = looked_up
    return found | _chat_settings(checkpoint.tokenizer())


def _engine_settings(hidden_size: int, layers: int, *, masked: bool) -> dict[str, Any]:
    """What the engine needs to call a graph; `masked` says that there is a second mask, for windows."""
    return {
        "hidden_size": hidden_size,
        "layer_nums": layers,
        "attention_mask": "float",
        "attention_type": "mix" if masked else "full",
        "is_mrope": False,
    }


def _chat_settings(tokenizer: Any) -> dict[str, Any]:
    """The chat template, if there is one."""
    if not tokenizer.chat_template:
        return {}
    template = {"chat_template": tokenizer.chat_template, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    return {"jinja": {name: value for name, value in template.items() if value}}


def _plain_config(checkpoint: Checkpoint) -> Any:
    """The config without what only a quantized model has."""
    config = checkpoint.unquantized_config()
    del config.quantization_config
    return config


def windows(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of each layer 1 if it has a sliding window and 0 if it sees everything; empty if all layers see everything."""
    found = tuple(int(has_window(checkpoint.model_config, n)) for n in range(checkpoint.shape.num_hidden_layers))
    return found if any(found) else ()


def _converter(operators: Operators, writer: MatrixWriter, output: Path, turned: int) -> Any:
    """`llmexport`'s converter, with linears from the checkpoint; in `written` is where they are, by their modules."""
    from utils.mnn_converter import MNNConverter

    checkpoint = writer.checkpoint

    class Converter(MNNConverter):
        written: dict[str, LinearBytes]

        def convert(self, convert_args: list[str]) -> None:
            import _tools

            _tools.mnnconvert(convert_args)

        def rebuild(self, json_path: str) -> str:
            _restore_numbers(Path(json_path), Path(self.onnx_model_path), checkpoint.norm_eps)
            return super().rebuild(json_path)

        def rebuild_linear(self, op: dict[str, Any], graph: dict[str, Any]) -> list[dict[str, Any]]:
            place = operators.places[next(each["s"] for each in op["main"]["attr"] if each["key"] == "name")]
            scheme = writer.scheme(place.module)
            self.args.sym = scheme is None or scheme.symmetric
            self.args.quant_bit = self.args.lm_quant_bit = 16 if scheme is None else scheme.bits
            self.args.quant_block = self.args.lm_quant_block = group_of(scheme)
            return super().rebuild_linear(op, graph)

        def build_weight(self, linear: Any, *_: Any) -> tuple[list[int], int, bool, int]:
            order = row_order(checkpoint.shape, linear.module, turned)
            made = self.written[linear.module] = writer.linear(self.mnn_weight, linear, order)
            self.mnn_weight_offset = self.mnn_weight.tell()  # where norms go on
            return [*made.external, 0], 0 if made.header == 0 else 1, made.wide, made.header

    unused = dict.fromkeys(NOTHING) | dict.fromkeys(OFF, False)
    args = SimpleNamespace(dst_path=str(output), mnnconvert="", quant_bit=16, quant_block=0, sym=True, **unused)
    converter = Converter(SimpleNamespace(args=args, experts=[]), operators.places)
    converter.written = {}
    return converter


def _restore_numbers(graph: Path, traced: Path, norm_eps: float) -> None:
    """Give a graph in JSON its numbers again, which MNN writes with six decimals: RoPE's and the norms' small ones."""
    import onnx

    exact = {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in onnx.load(traced).graph.node
        if node.op_type == "Constant"
    }
    whole = json.loads(graph.read_text())
    for op in whole["oplists"]:
        if op["type"] == "LayerNorm":
            op["main"]["epsilon"] = norm_eps
        elif op["type"] == "Const" and op["main"].get("float32s"):
            op["main"]["float32s"] = exact[op["name"]].flatten().tolist()
    write_json(graph, whole)


def _name_by_content(graph: Path, as_json: Path) -> None:
    """Give a graph an identifier that its content decides, so that the same checkpoint leaves the same bytes."""
    drawn, data = json.loads(as_json.read_text())["mnn_uuid"].encode(), graph.read_bytes()
    content = hashlib.sha256(data.replace(drawn, b"")).hexdigest()
    graph.write_bytes(data.replace(drawn, str(uuid5(NAMESPACE_OID, content)).encode()))


def main() -> None:
    """Do one job."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    sys.path.insert(0, str(distribution("llmexport").locate_file("llmexport")))
    answer, output = os.dup(1), Path(job["output"])
    os.dup2(2, 1)  # the converter prints
    if "tokenizer" in job:
        build_stub(Path(job["tokenizer"]), output)
        found: Any = None
    else:
        family = Family.model_validate(job["family"])
        found = build(Checkpoint(Path(job["checkpoint"]), family), output, job["embedding_bits"]).as_data()
    with os.fdopen(answer, "w") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
