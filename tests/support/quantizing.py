"""The quantize stage on tiny models, without the run around it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autoglm_compress.architecture import ModelShape, family_of
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.stages.base import StageContext
from autoglm_compress.stages.quantize import Quantize
from support.quiet import quiet

LAYERS = 3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": LAYERS,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
}


def make_model(folder: Path, model_type: str, outliers: bool = False, seed: int = 0, **changes) -> Path:
    """A tiny random model with biases and uneven norm gains.

    `outliers` makes every 32nd channel that linears read 30 times larger, in a model that is otherwise well-behaved:
    small weights, so that errors add up instead of being amplified.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | {"dtype": "bfloat16"} | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
            if outliers and name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter.data[::32] *= 30
        else:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.01 if outliers else 0.1)
    model.to(config.dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def batches(count: int = 2, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (2, 32), generator=generator) for _ in range(count)]


class RandomText:
    """Tokens by chance in the place of calibration text."""

    @property
    def batches(self) -> list[torch.Tensor]:
        return batches()

    def held_out(self) -> list[torch.Tensor]:
        return batches(seed=2)


def context_for(stage: Quantize, source: Path, folder: Path) -> StageContext:
    checkpoint = Checkpoint(source)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return StageContext(
        origin=checkpoint,
        source_folder=source,
        shape=stage.plan(checkpoint.shape),
        lineage=Lineage.of_source(checkpoint.shape),
        result=folder / "target",
        text=RandomText(),
        statistics=lambda: pytest.fail("quantize needs no statistics"),
        runtime=quiet(),
        seed=0,
        work=folder / "work",
        evaluate=lambda *_: pytest.fail("quantize evaluates nothing"),
        open_checkpoint=lambda *_: pytest.fail("quantize needs no other checkpoint"),
    )


def run_stage(source: Path, folder: Path, **options) -> StageContext:
    """Quantize into `target` below a folder."""
    stage = Quantize(stage="quantize", **({"max_divergence": 100} | options))
    context = context_for(stage, source, folder)
    stage.run(context)
    return context


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(batches(1)[0]).logits.float()


def loaded_logits(folder: Path) -> torch.Tensor:
    """The logits of a checkpoint in plain transformers, which must find every tensor that it looks for."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return logits(model.eval())


def plain_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """An unquantized transformers model with every tensor as our reader gives it."""
    config = checkpoint.model_config
    config.quantization_config = None
    model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)
    state = {name: checkpoint.read(name) for name, _ in checkpoint.shape.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if checkpoint.shape.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.norm() / reference.norm())


def shape_of(model_type: str, **changes) -> ModelShape:
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | changes))
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return ModelShape.of(family_of(config.to_dict(), "test"), config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
