"""AutoAWQ as a backend, for comparison: its own search, clipping and packing, with fixes that it needs to run here.

AutoAWQ 0.2.9 is the last release, and optional. It knows 4 bits only. On a CPU it corrupts the weights while it
searches scales, it fails on linears with few outputs, and it does not know GLM. This module fixes these faults from
outside.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.errors import UserError
from autoglm_compress.forward.one_layer_model import fast_dtype

BITS = 4
PACKED = 8
"""Output features that share an int32."""
CLIPPED_AT_ONCE = 64


def quantize_with_autoawq(
    folder: Path, rows: torch.Tensor, group_size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a checkpoint to 4 bits with zero points by AutoAWQ's defaults.

    Args:
        folder: an unquantized checkpoint of transformers.
        rows: token ids [samples, length] to calibrate on.
        group_size: how many input features share a scale; it must divide those of every linear.
        dtype: the dtype of its computation and of all tensors that are not packed.

    Returns:
        The model's tensors by their names in a checkpoint: `qweight`, `qzeros` and `scales` of the layers' linears in
        the GEMM layout, all others unchanged.

    Raises:
        UserError: AutoAWQ is not installed or does not run here, or does not support this model or group size.
    """
    awq = _import_autoawq()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # With a key-value cache, the layers would add to it in each of their many forward passes.
    model.config.use_cache = False
    family = model.config.model_type
    families = awq.families | {name: _glm_class(awq.families["llama"]) for name in ("glm", "glm4")}
    if family not in families:
        raise UserError(f"{folder}: AutoAWQ does not know the model type {family!r}.")
    options = {"zero_point": True, "q_group_size": group_size, "w_bit": BITS, "version": "GEMM"}
    adapter = families[family](model, family, False, model.config, awq.AwqConfig.from_dict(options), None)
    _check_sizes(folder, adapter.get_model_layers(model), group_size)
    samples, length = rows.shape
    adapter.quantize(
        quant_config=options,
        calib_data=rows.tolist(),
        max_calib_samples=samples,
        max_calib_seq_len=length,
        quantizer_cls=_quantizer_class(awq.AwqQuantizer),
    )
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in tied}


def write_with_autoawq(
    source: Checkpoint, target: CheckpointWriter, batches: Callable[[], list[torch.Tensor]], group_size: int
) -> None:
    """Quantize a whole model with AutoAWQ and write its layers, unless they are already written.

    Args:
        source: the unquantized model.
        target: the writer; each layer is a unit.
        batches: gives the token ids [batch, length] to calibrate on.
        group_size: how many input features share a scale.

    Raises:
        UserError: as `quantize_with_autoawq`.
    """
    layers = range(source.shape.num_hidden_layers)
    if all(target.has(1 + layer) for layer in layers):
        return
    # AutoAWQ works on the CPU, whatever the run's device.
    dtype = fast_dtype(source, torch.device("cpu"))
    tensors = quantize_with_autoawq(source.folder, torch.cat(batches()), group_size, dtype)
    for name, tensor in tensors.items():
        if name in source.infos:
            tensors[name] = tensor.to(source.infos[name].dtype)
    for layer in layers:
        prefix = source.family.layer_prefix(layer)
        unit = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(prefix)}
        target.write(1 + layer, unit)


def _import_autoawq() -> SimpleNamespace:
    """The parts of AutoAWQ that are used. Importing them does not change Python's warning filters."""
    try:
        with warnings.catch_warnings(record=True):
            from awq.models._config import AwqConfig
            from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
            from awq.quantize.quantizer import AwqQuantizer
    except ModuleNotFoundError as error:
        if error.name == "awq":
            raise UserError("AutoAWQ is not installed: pip install 'autoglm-compress[autoawq]'.") from None
        raise UserError(_cannot_import(error)) from None
    except ImportError as error:
        raise UserError(_cannot_import(error)) from None
    return SimpleNamespace(AwqConfig=AwqConfig, AwqQuantizer=AwqQuantizer, families=AWQ_CAUSAL_LM_MODEL_MAP)


def _cannot_import(error: ImportError) -> str:
    return (
        f"AutoAWQ cannot be imported with transformers {transformers.__version__} and torch {torch.__version__} "
        f"({error}): pip install 'autoglm-compress[autoawq]' transformers==5.23.0 torch==2.13.0."
    )


def _check_sizes(folder: Path, layers: nn.ModuleList, group_size: int) -> None:
    """Refuse models and group sizes on which AutoAWQ would fail after minutes."""
    for name, linear in layers[0].named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if group_size < 1 or linear.in_features % group_size:
            raise UserError(
                f"{folder}: AutoAWQ needs a group_size that divides the {linear.in_features} input features of {name}, "
                f"given {group_size}."
            )
        if linear.out_features % PACKED:
            raise UserError(
                f"{folder}: AutoAWQ needs a multiple of {PACKED} output features, {name} has {linear.out_features}."
            )


def _quantizer_class(base: type) -> type:
    """AutoAWQ's quantizer with two fixes: its search has a backup that it does not overwrite, and any number of output
    features works.
    """

    class Quantizer(base):
        def _compute_best_scale(
            self, x: torch.Tensor, w_mean: torch.Tensor, x_mean: torch.Tensor, module: nn.Module, *rest: Any
        ) -> torch.Tensor:
            # The search restores the module from state_dict().cpu(): on a CPU those are the very tensors it scales.
            hook = module.register_state_dict_post_hook(_clone)
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module, *rest)
            finally:
                hook.remove()

        def _compute_best_clip(self, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            # The search takes this many output features at once and no fewer; each is clipped by itself.
            padded = nn.functional.pad(weight, (0, 0, 0, -len(weight) % CLIPPED_AT_ONCE))
            return super()._compute_best_clip(padded, inputs)[: len(weight)]

    return Quantizer


def _clone(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    for name, tensor in state.items():
        state[name] = tensor.clone()


def _glm_class(llama: type) -> type:
    """AutoAWQ's description of GLM and GLM-4, whose gate and up projections are one linear."""

    class Glm(llama):
        @staticmethod
        def get_layers_for_scaling(
            module: Any, input_feat: dict[str, torch.Tensor], module_kwargs: dict[str, Any]
        ) -> list[dict[str, Any]]:
            attention, mlp = module.self_attn, module.mlp
            into_attention = {
                "prev_op": module.input_layernorm,
                "layers": [attention.q_proj, attention.k_proj, attention.v_proj],
                "inp": input_feat["self_attn.q_proj"],
                "module2inspect": attention,
                "kwargs": module_kwargs,
            }
            # As for AutoAWQ's own families, v and o are not scaled if there are fewer KV heads than heads.
            value = {
                "prev_op": attention.v_proj,
                "layers": [attention.o_proj],
                "inp": input_feat["self_attn.o_proj"],
            }
            into_mlp = {
                "prev_op": module.post_attention_layernorm,
                "layers": [mlp.gate_up_proj],
                "inp": input_feat["mlp.gate_up_proj"],
                "module2inspect": mlp,
            }
            # AutoAWQ scales the last rows of the producer, which here are the up half.
            up = {"prev_op": mlp.gate_up_proj, "layers": [mlp.down_proj], "inp": input_feat["mlp.down_proj"]}
            values = [value] if attention.v_proj.weight.shape == attention.o_proj.weight.shape else []
            return [into_attention, *values, into_mlp, up]

    return Glm
