"""What a GGUF file says of a model beside its tensors and its tokenizer."""

from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.gguf_families import (
    context_length,
    engine_family,
    rope_base,
    rope_sections,
    rotary_dimensions,
)


def add_metadata(writer: Any, shape: ModelShape, config: Any, name: str, file_type: int) -> None:
    """Add the sizes of a model, its RoPE and its name to a `gguf.GGUFWriter`.

    Args:
        writer: the writer.
        shape: the model's.
        config: the text tower's `transformers` config.
        name: what to call the model.
        file_type: ggml's number for the type that most of it has.
    """
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_rope_freq_base(rope_base(shape, config))
    told = shape.head_dim if engine_family(shape).factors else rotary_dimensions(shape, config)
    writer.add_rope_dimension_count(told)
    if sections := rope_sections(shape, config):
        writer.add_rope_dimension_sections(sections)
    if shape.first_layers:
        # Without the vision tower's file these layers are given no features.
        writer.add_num_deepstack_layers(shape.first_layers)
    _add_rope_scaling(writer, config.rope_parameters)


def _add_rope_scaling(writer: Any, rope: dict[str, Any]) -> None:
    """What longer contexts do to RoPE; `llama3` is in a tensor of its own."""
    import gguf

    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
