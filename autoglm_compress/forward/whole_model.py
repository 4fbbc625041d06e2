"""Whole `transformers` models from checkpoints, for work that cannot go layer by layer."""

from typing import Any

import torch
from torch import nn

from autoglm_compress.architecture import Family
from autoglm_compress.architecture.family import ROOT
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.features import model_with
from autoglm_compress.forward.one_layer_model import text_model
from autoglm_compress.forward.scaled_linear import ScaledLinear

GENERATION_CONFIG = "generation_config.json"


class TextTower(nn.Module):
    """The text tower of a model that has others beside it, with its head, on the meta device.

    Its parameters have the names that the tensors have in files. It reads text, and needs no memory for the others.
    """

    def __init__(self, family: Family, config: Any, dtype: torch.dtype) -> None:
        """The tower that a text config object describes."""
        super().__init__()
        self._decoder_name, self._head_name = family.prefix.removesuffix("."), family.roles.head
        with torch.device("meta"):
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self._place(self._decoder_name, text_model(config, family, dtype))
        self._place(self._head_name, head)
        self._tied = config.tie_word_embeddings and family.transformers_ties

    def _place(self, name: str, module: nn.Module) -> None:
        """Put a module under a name with dots, within modules that hold nothing else."""
        holder: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.add_module(last, module)

    def get_decoder(self) -> Any:
        """The layers with what stands around them, but for the head."""
        return self.get_submodule(self._decoder_name)

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.get_submodule(self._head_name)

    def tie_weights(self) -> None:
        """Let the head be the embedding, where the config says so."""
        if self._tied:
            embedding = self.get_decoder().get_submodule("embed_tokens")
            self.get_output_embeddings().register_parameter("weight", embedding.get_parameter("weight"))


def is_text_alone(family: Family) -> bool:
    """Whether a family's models are a text tower and nothing else, which `AutoModelForCausalLM` loads."""
    return family.config == ROOT and not family.kept


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, keep_integers: bool = False) -> Any:
    """A causal language model with the weights of a checkpoint's text tower: a `TextTower` where there are others.

    Quantized linears are dequantized, or those of the layers become `ScaledLinear`s.
    """
    from transformers import AutoModelForCausalLM

    config = checkpoint.unquantized_config()
    config.attention_dropout = 0.0
    if is_text_alone(checkpoint.family):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = TextTower(checkpoint.family, config, dtype)
    quantization = checkpoint.shape.quantization
    head = checkpoint.family.roles.head
    kept = {name for name in quantization.schemes if name != head} if quantization and keep_integers else set()
    for module in kept:
        model.set_submodule(module, ScaledLinear.of(checkpoint, module, device, dtype))
    names = (name for name, _ in checkpoint.shape.tensors() if name.removesuffix(".weight") not in kept)
    weights = {name: checkpoint.read(name).to(device, dtype) for name in names}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    text = model.get_decoder()
    text.rotary_emb = type(text.rotary_emb)(config=config).to(device)
    return model.eval()


def load_generating_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """A checkpoint's whole model with its towers, as plain `transformers` has it; packed weights are dequantized.

    Its generation settings are those beside the checkpoint.
    """
    from transformers import GenerationConfig

    weights = {name: checkpoint.read(name).to(dtype) for name, _ in checkpoint.shape.tensors()}
    weights |= {name: weight.to(dtype) for name, weight in checkpoint.kept_weights()}
    model = model_with(checkpoint, checkpoint.whole_unquantized_config(), weights, device, dtype)
    if (checkpoint.folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model
