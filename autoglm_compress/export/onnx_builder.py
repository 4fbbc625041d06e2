"""The graph of a model by onnxruntime-genai's builder, with the checkpoint's integers in it.

The builder knows how ONNX Runtime wants attention, norms and caches, and what stands in `genai_config.json`. It is
given a model of `transformers` in which only vectors have values. What it makes of matrices is replaced here: integers
go into MatMulNBits as they are, plain numbers are stored in their own dtype and cast when the engine loads them, and
both are read from the checkpoint when the file is written. RoPE's angles are those that `transformers` computes.

Imports onnxruntime-genai: only what needs the package may import this module.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from onnxruntime_genai.models.builders.base import Model

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.plain_model import meta_model
from autoglm_compress.export.eight_bits import BLOCK, eight_bit_blocks
from autoglm_compress.export.onnx_blocks import BlockLayout, block_layout, pack_scales, pack_weights
from autoglm_compress.export.onnx_families import GraphFamily, context_length, graph_family
from autoglm_compress.export.onnx_matrices import (
    SCALES,
    WEIGHTS,
    ZEROS,
    Matrix,
    MatrixReader,
    Rows,
    out_features,
    scheme_of,
)
from autoglm_compress.export.options import ExportOptions, accuracy_level
from autoglm_compress.export.own_graphs import rope_frequencies
from autoglm_compress.export.text_models import has_window

CONTRIB = "com.microsoft"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""What the graph calls the two."""


class GraphModel(Model):
    """The builder, for the families that `onnx_families` has.

    Args:
        checkpoint: what the graph is made from; without `shape_problem` and `config_problem`.
        options: of the export.
        file: the name of the file.
    """

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, file: str) -> None:
        self.family: GraphFamily = graph_family(checkpoint.shape)
        self.reader = MatrixReader(checkpoint)
        self.matrices: dict[torch.nn.Module, Matrix] = {}
        self.checkpoint, self.shape, self.options = checkpoint, checkpoint.shape, options
        self.hf_config = checkpoint.unquantized_config()
        del self.hf_config.quantization_config
        self.hf_config.architectures = [checkpoint.family.architecture]
        self.hf_config._name_or_path = str(checkpoint.folder)
        self.angles = rope_frequencies(self.hf_config, checkpoint.family.auto_class)
        self.hf_config.max_position_embeddings = context_length(self.hf_config)
        super().__init__(
            self.hf_config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", cache_dir="", extra_options={"filename": file}
        )
        self.model_type = self.family.model_type

    # What the builder is told of the model.

    def load_weights(self, input_path: str) -> Any:
        """The model of `transformers`: vectors have values, and it is known of which rows linears are."""
        model = meta_model(self.hf_config, self.checkpoint.family.auto_class)
        vectors = {name: self.checkpoint.read(name).float() for name, size in self.shape.tensors() if len(size) == 1}
        model.load_state_dict(vectors, strict=False, assign=True)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.matrices[module] = (Rows(name, 0, module.out_features, module.in_features),)
        return model

    def make_rope_init(self, config: Any) -> None:
        """RoPE as `transformers` has it; what it does not turn is turned by nothing, so heads are turned whole."""
        self.rope_attrs |= {"partial_rotary_factor": 1.0, "rotary_embedding_dim": 0}
        self.rope_attrs["interleaved"] = int(self.family.interleaved)

    def make_attention_init(self, config: Any) -> None:
        """Norms of queries and keys, where the family has them."""
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = self.family.norms
        super().make_attention_init(config)

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, fp32 [positions, head_dim / 2]."""
        frequencies, scale = self.angles
        angles = torch.outer(torch.arange(self.context_length, dtype=torch.float32), frequencies)
        padding = (0, self.head_size // 2 - len(frequencies))
        cosines = torch.nn.functional.pad(angles.cos() * scale, padding, value=1.0)
        return cosines, torch.nn.functional.pad(angles.sin() * scale, padding)

    def has_lm_head(self, module: Any) -> bool:
        """Whether a module is the head; others may be as wide as the vocabulary."""
        return module is self.weights.lm_head

    def is_local(self, layer_id: int) -> bool:
        """Whether a layer has a sliding window; Mistral's config has no list of layers."""
        return has_window(self.hf_config, layer_id)

    # Matrices.

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:
        """Whether queries, keys and values go through one matrix: if they are quantized alike."""
        try:
            scheme_of(self.shape, self._joined(attention.q_proj, attention.k_proj, attention.v_proj))
        except ValueError:
            return False
        return True

    def make_packed_matmul(self, q_matmul: Any, k_matmul: Any, v_matmul: Any, basename: str, root_input: str) -> str:
        """One product for queries, keys and values."""
        return self._multiply(self._joined(q_matmul, k_matmul, v_matmul), basename, root_input, f"{basename}/output_0")

    def make_mlp_unpacked_regular(self, layer_id: int, mlp: Any, gate_up_linear: Any, root_input: str) -> None:
        """Gate and up as two, where the checkpoint has one matrix for both."""
        (rows,) = self.matrices[gate_up_linear]
        for number, name in enumerate(("gate_proj", "up_proj")):
            half = torch.nn.Linear(1, 1, bias=False, device="meta")
            self.matrices[half] = (rows.half(number),)
            setattr(mlp, name, half)

    def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        """One product."""
        output = "logits" if kwargs.get("logits") else f"{basename}/output_0"
        if kwargs.get("logits"):
            return self._make_head(matmul, basename, root_input, output)
        return self._multiply(self.matrices[matmul], basename, root_input, output)

    def _make_head(self, head: Any, name: str, root_input: str, output: str) -> str:
        if self.shape.tie_word_embeddings:
            return self._make_tied_head(name, root_input, output)
        matrix = self.matrices[head]
        if self._rounds(matrix):
            layout, weights = self._store_rounded(HEAD, matrix)
            return self._multiply_integers(name, root_input, output, layout, self.shape.vocab_size, weights)
        return self._multiply(matrix, name, root_input, output)

    def _make_tied_head(self, name: str, root_input: str, output: str) -> str:
        """The product with the embedding's own tensor."""
        size = [self.shape.vocab_size, self.shape.hidden_size]
        if self.options.embedding_bits is None:
            weight = self._as_fp32(f"{EMBEDDING}.weight", f"{name}/Cast", size)
            self.make_node("FusedMatMul", [root_input, weight], [output], name=name, domain=CONTRIB, transB=1)
            self._shaped(output, size[0])
            return name
        layout, blocks = _rounded_layout(size[1]), f"{name}/blocks"
        self.make_reshape(
            blocks,
            [f"{EMBEDDING}.{WEIGHTS}", f"/model/constants/INT64/[{size[0]}, {layout.blocks}, {layout.block}]"],
            dtype=ir.DataType.UINT8,
            shape=[size[0], layout.blocks, layout.block],
        )
        names = [f"{blocks}/output_0", f"{EMBEDDING}.{SCALES}"]
        return self._multiply_integers(name, root_input, output, layout, size[0], names)

    def _multiply(self, matrix: Matrix, name: str, root_input: str, output: str) -> str:
        """The product with a matrix, in integers or in plain numbers; returns the name of its node."""
        stored, rows, columns = name[1:].replace("/", "."), out_features(matrix), matrix[0].columns
        scheme = scheme_of(self.shape, matrix)
        if scheme is None:
            transposed = (columns, rows)
            self._store(f"{stored}.weight", transposed, self.checkpoint.dtype, lambda: self.reader.values(matrix).T)
            weight = self._as_fp32(f"{stored}.weight", f"{name}/Cast", transposed)
            self.make_node("MatMul", [root_input, weight], [output], name=name)
            self._shaped(output, rows)
            return name
        layout = block_layout(scheme, columns)
        return self._multiply_integers(
            name, root_input, output, layout, rows, self._store_integers(stored, matrix, layout)
        )

    def _multiply_integers(
        self, name: str, root_input: str, output: str, layout: BlockLayout, rows: int, names: Sequence[str]
    ) -> str:
        self.make_node(
            "MatMulNBits",
            [root_input, *names],
            [output],
            name=name,
            domain=CONTRIB,
            K=layout.columns,
            N=rows,
            bits=layout.bits,
            block_size=layout.block,
            accuracy_level=accuracy_level(self.options),
        )
        self._shaped(output, rows)
        return name

    # The embedding.

    def make_embedding_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:
        """Rows of the embedding, fp32."""
        size = (self.shape.vocab_size, self.shape.hidden_size)
        module = self.checkpoint.family.embedding.removesuffix(".weight")
        matrix, ids = (Rows(module, 0, *size),), self.input_names["input_ids"]
        if self._rounds(matrix):
            return self._look_up_integers(matrix, basename, ids)
        self._store(f"{EMBEDDING}.weight", size, self.checkpoint.dtype, lambda: self.reader.values(matrix))
        name, found = f"{basename}/Gather", f"{basename}/Gather/output_0"
        self.make_node("Gather", [f"{EMBEDDING}.weight", ids], [found], name=name)
        self.make_value(found, from_torch_dtype(self.checkpoint.dtype), shape=self.make_hidden_state_shape())
        return self._as_fp32(found, f"{basename}/Cast", self.make_hidden_state_shape())

    def _look_up_integers(self, matrix: Matrix, basename: str, ids: str) -> str:
        layout, names = self._store_rounded(EMBEDDING, matrix)
        name, found = f"{basename}/GatherBlockQuantized", f"{basename}/GatherBlockQuantized/output_0"
        self.make_node(
            "GatherBlockQuantized",
            [names[0], ids, names[1]],
            [found],
            name=name,
            domain=CONTRIB,
            bits=layout.bits,
            block_size=layout.block,
            gather_axis=0,
            quantize_axis=1,
        )
        return found

    # Layers with norms on both sides of attention and FFN.

    def make_layer(self, layer_id: int, layer: Any) -> None:
        """One layer."""
        if not self.family.sandwich:
            super().make_layer(layer_id, layer)
            return
        attrs = self.layernorm_attrs
        self.make_layernorm(layer_id, layer.input_layernorm, not attrs["first_layernorm"], True, "input")
        self.make_attention(layer_id, layer.self_attn, root_input=attrs["output_0"])
        self._norm_what_is_added(layer_id, layer.post_self_attn_layernorm, "post_self_attn")
        self.make_layernorm(layer_id, layer.post_attention_layernorm, True, True, "post_attention")
        self.make_mlp(layer_id, layer.mlp, root_input=attrs["output_0"])
        self._norm_what_is_added(layer_id, layer.post_mlp_layernorm, "post_mlp")
        attrs["first_layernorm"], attrs["last_layernorm"] = False, layer_id == self.num_layers - 1

    def _norm_what_is_added(self, layer_id: int, norm: Any, place: str) -> None:
        """Norm `skip_input`, which the next norm adds to the residual stream."""
        stream = self.layernorm_attrs["root_input"]
        self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"]
        self.make_layernorm(layer_id, norm, False, True, place)
        self.layernorm_attrs["root_input"] = stream
        self.layernorm_attrs["skip_input"] = self.layernorm_attrs["output_0"]

    # Tensors.

    def _joined(self, *linears: torch.nn.Module) -> Matrix:
        return tuple(rows for linear in linears for rows in self.matrices[linear])

    def _rounds(self, matrix: Matrix) -> bool:
        """Whether the options round an end that is stored in plain numbers."""
        return self.options.embedding_bits is not None and scheme_of(self.shape, matrix) is None

    def _store_rounded(self, name: str, matrix: Matrix) -> tuple[BlockLayout, list[str]]:
        """Weights and scales of a matrix rounded to 8 bits: of the embedding flat, of the head in blocks."""
        layout, rows = _rounded_layout(matrix[0].columns), out_features(matrix)
        parts = {
            WEIGHTS: lambda: pack_weights(layout, eight_bit_blocks(self.reader.values(matrix))[0]),
            SCALES: lambda: pack_scales(layout, eight_bit_blocks(self.reader.values(matrix))[1]),
        }
        sizes = {
            WEIGHTS: (rows, layout.columns) if name == EMBEDDING else (rows, layout.blocks, layout.block),
            SCALES: (rows, layout.blocks),
        }
        for part, make in parts.items():
            kind = torch.uint8 if part == WEIGHTS else torch.float32
            self._store(f"{name}.{part}", sizes[part], kind, _numpy_of(make, sizes[part]))
        return layout, [f"{name}.{part}" for part in parts]

    def _store_integers(self, name: str, matrix: Matrix, layout: BlockLayout) -> list[str]:
        """Weights, scales and zero points of a matrix; returns their names."""
        rows, blocks = out_features(matrix), layout.blocks
        sizes = {WEIGHTS: (rows, blocks, layout.block * layout.bits // 8), SCALES: (rows, blocks)}
        if not layout.symmetric:
            sizes[ZEROS] = (rows, layout.row_bytes[2])
        for part, size in sizes.items():
            kind = torch.float32 if part == SCALES else torch.uint8
            self._store(f"{name}.{part}", size, kind, lambda part=part: self.reader.part(matrix, layout, part))
        return [f"{name}.{part}" for part in sizes]

    def _store(self, name: str, size: Sequence[int], kind: torch.dtype, read: Any) -> None:
        """An initializer that is read when it is written."""
        dtype = from_torch_dtype(kind)

        def tensor() -> ir.TensorProtocol:
            found = read()
            if isinstance(found, np.ndarray):
                return ir.Tensor(found, dtype=dtype, name=name)
            return TorchTensor(found.contiguous(), name=name)

        value = self.make_value(name, dtype, size)
        value.const_value = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(size), name=name)
        self.model.graph.register_initializer(value)

    def _as_fp32(self, value: str, name: str, size: Sequence[Any]) -> str:
        """A value in fp32: the engine computes in nothing else on CPUs."""
        if self.checkpoint.dtype == torch.float32:
            return value
        self.make_cast(name, value, ir.DataType.FLOAT, shape=size)
        return f"{name}/output_0"

    def _shaped(self, output: str, width: int) -> None:
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=width))


def _rounded_layout(columns: int) -> BlockLayout:
    return BlockLayout(8, BLOCK, columns, symmetric=True)


def _numpy_of(make: Any, size: Sequence[int]) -> Any:
    return lambda: make().reshape(size)
