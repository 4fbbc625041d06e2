"""ReplaceMe (Shopkhoev et al. 2025) for models that fit in memory: a block of layers becomes one linear map.

The block is the contiguous one whose input and output states are closest in angle. With M the output of the MLP of the
layer before it, Y the residual stream without that output, and L the stream after the block, T minimises
|M T + Y - L|^2 and is multiplied into down_proj, so the result is a plain checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoglm_compress import Checkpoint
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.text import PYTHON_DOCS
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.progress import Progress


@torch.no_grad()
def replace_block(model: Path, target: Path, layers: int, calibration: dict[str, Any]) -> Path:
    """Write the model with so many layers left; the regularisation is the paper's default, none."""
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = CalibrationOptions(**calibration)
    files = {name: None if name == PYTHON_DOCS else Path(name) for name in options.rows}
    gone = source.config.num_hidden_layers - layers
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(source.model.layers):
        layer.mlp.register_forward_hook(lambda _, __, output, number=number: outputs.update({number: output}))
    angles = torch.zeros(layers, dtype=torch.float64)
    size = source.config.hidden_size
    grams, crosses = torch.zeros(2, layers, size, size, dtype=torch.float64)
    for batch in CalibrationText(options, files, Checkpoint(model), Progress(Console(quiet=True))).batches:
        states = source.model(batch, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        for first in range(1, layers):
            before, after = states[first].flatten(0, 1), states[first + gone].flatten(0, 1)
            angles[first] += torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1).arccos().sum()
            written = outputs[first - 1].flatten(0, 1)
            wanted = after - (before - written)
            grams[first] += written.T.double() @ written.double()
            crosses[first] += written.T.double() @ wanted.double()
    angles[0] = torch.inf  # nothing stands before the first layer that could take over
    first = int(angles.argmin())
    transform = torch.linalg.lstsq(grams[first], crosses[first]).solution
    down = source.model.layers[first - 1].mlp.down_proj
    down.weight.copy_((transform.T @ down.weight.double()).float())
    kept = [layer for number, layer in enumerate(source.model.layers) if not first <= number < first + gone]
    source.model.layers = torch.nn.ModuleList(kept)
    source.config.num_hidden_layers = layers
    if getattr(source.config, "layer_types", None):
        source.config.layer_types = source.config.layer_types[:layers]
    source.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
