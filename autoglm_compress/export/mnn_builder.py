"""MNN's converter in a process of its own, run as a module: it prints, and its packages have names such as `utils`.

A job `{"checkpoint", "family", "output"}` comes as JSON on the standard input, or `{"tokenizer", "output"}` for a
tokenizer alone. The graph is traced and converted, and filled with one linear after another from the checkpoint, so
that one matrix is what is in memory. The files are in the folder `output` then, and the answer on the standard output
is what was rounded, as JSON.

Of `llmexport`, the operators that stand for linears and attention in a graph, what makes MNN's of them, and the
tokenizer's file are used; its own models and its command are not. Of MNN, `_tools` is called: `MNN.tools` installs a
package by pip and reports each use when it is imported.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from autoglm_compress.architecture import Family, ModelShape
from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.mnn_families import rope, row_order, scheme_of, windows
from autoglm_compress.export.mnn_graph import Graph, Operators, trace
from autoglm_compress.export.mnn_names import EMBEDDING, GRAPH, MODEL_SETTINGS, SETTINGS, TOKENIZER, WEIGHTS
from autoglm_compress.export.mnn_weights import LinearBytes, Roundings, write_linear, write_numbers

NOTHING = ("quant_config", "gptq_path", "lora_path")
OFF = ("awq", "hqq", "omni", "smooth", "skip_weight", "tie_word_embeddings")
"""Options of `llmexport` that its converter looks at, and that are not used."""


def build(checkpoint: Checkpoint, output: Path) -> Roundings:
    """Write a checkpoint for MNN into a folder, which is made; returns what was rounded, by tensor."""
    from utils.custom_op import FakeLinear, FusedAttention

    output.mkdir(parents=True, exist_ok=True)
    os.chdir(output)  # the converter leaves a log where it is
    config, shape = checkpoint.model_config, checkpoint.shape
    masks, roundings = windows(config), Roundings()
    frequencies, scaling = rope(shape, config)
    operators, traced = Operators(FakeLinear, FusedAttention), output / GRAPH.replace(".mnn", ".onnx")
    with torch.no_grad():
        trace(Graph(checkpoint, operators, frequencies, scaling, masks), shape, masks, traced)
    _converter(checkpoint, operators, output, roundings).export(str(traced))
    with (output / EMBEDDING).open("wb") as file:
        name = shape.family.embedding
        roundings.by_tensor[name] = write_numbers(file, checkpoint.read(name), torch.bfloat16, None)
    export_tokenizer(checkpoint.folder, output)
    write_json(output / SETTINGS, _settings())
    write_json(output / MODEL_SETTINGS, _model_settings(checkpoint, masks))
    return roundings


def export_tokenizer(folder: Path, output: Path) -> None:
    """Write the tokenizer of a model's folder for MNN."""
    from utils.tokenizer import LlmTokenizer

    LlmTokenizer.from_pretrained(str(folder), model_type="").export(str(output))


def build_stub(folder: Path, output: Path) -> None:
    """Write the tokenizer of a model's folder, and settings, for an engine that has no model."""
    export_tokenizer(folder, output)
    write_json(output / SETTINGS, _settings())
    stub = {"hidden_size": 8, "layer_nums": 1, "attention_mask": "float", "attention_type": "full", "is_mrope": False}
    write_json(output / MODEL_SETTINGS, stub)


def _settings() -> dict[str, Any]:
    """How the engine runs the model, if nobody says otherwise: activations in 8 bits, as fast as it can."""
    return {
        "llm_model": GRAPH,
        "llm_weight": WEIGHTS,
        "tokenizer_file": TOKENIZER,
        "backend_type": "cpu",
        "thread_num": 4,
        "precision": "low",
        "memory": "low",
        "sampler_type": "greedy",
    }


def _model_settings(checkpoint: Checkpoint, masks: tuple[int, ...]) -> dict[str, Any]:
    """What the engine has to know of the model beside its graph."""
    tokenizer, config = checkpoint.tokenizer(), checkpoint.model_config
    found: dict[str, Any] = {
        "model_type": config.model_type,
        "hidden_size": checkpoint.shape.hidden_size,
        "layer_nums": checkpoint.shape.num_hidden_layers,
        "attention_mask": "float",
        "attention_type": "mix" if masks else "full",
        "is_mrope": False,
    }
    if masks:
        found["sliding_window"] = config.sliding_window
    if tokenizer.chat_template:
        template = {"chat_template": tokenizer.chat_template, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
        found["jinja"] = {name: value for name, value in template.items() if value}
    return found


def _converter(checkpoint: Checkpoint, operators: Operators, output: Path, roundings: Roundings) -> Any:
    """`llmexport`'s converter, with linears from the checkpoint."""
    from utils.mnn_converter import MNNConverter

    shape: ModelShape = checkpoint.shape

    class Converter(MNNConverter):
        def convert(self, convert_args: list[str]) -> None:
            import _tools

            _tools.mnnconvert(convert_args)

        def rebuild(self, json_path: str) -> str:
            _restore_numbers(Path(json_path), Path(self.onnx_model_path), checkpoint.norm_eps)
            return super().rebuild(json_path)

        def rebuild_linear(self, op: dict[str, Any], graph: dict[str, Any]) -> list[dict[str, Any]]:
            place = operators.places[next(each["s"] for each in op["main"]["attr"] if each["key"] == "name")]
            scheme = scheme_of(shape, place.module)
            self.args.sym = scheme is None or scheme.symmetric
            self.args.quant_bit = self.args.lm_quant_bit = 16 if scheme is None else scheme.bits
            block = 0 if scheme is None or scheme.group_size == -1 else scheme.group_size
            self.args.quant_block = self.args.lm_quant_block = block
            return super().rebuild_linear(op, graph)

        def build_weight(self, linear: Any, *_: Any) -> tuple[list[int], int, bool, int]:
            order = row_order(shape, checkpoint.model_config, linear.module)
            made: LinearBytes = write_linear(self.mnn_weight, checkpoint, linear, order, roundings)
            self.mnn_weight_offset = self.mnn_weight.tell()  # where norms go on
            return [*made.external, 0], 0 if made.header == 0 else 1, made.wide, made.header

    unused = dict.fromkeys(NOTHING) | dict.fromkeys(OFF, False)
    args = SimpleNamespace(dst_path=str(output), mnnconvert="", quant_bit=16, quant_block=0, sym=True, **unused)
    return Converter(SimpleNamespace(args=args, experts=[]), operators.places)


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


def main() -> None:
    """Do one job."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    sys.path.insert(0, str(Path(find_spec("llmexport").origin).parent))
    answer, output = os.dup(1), Path(job["output"])
    os.dup2(2, 1)  # the converter prints
    if "tokenizer" in job:
        build_stub(Path(job["tokenizer"]), output)
        found: Any = None
    else:
        family = Family.model_validate(job["family"])
        found = build(Checkpoint(Path(job["checkpoint"]), family), output).as_data()
    with os.fdopen(answer, "w") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
