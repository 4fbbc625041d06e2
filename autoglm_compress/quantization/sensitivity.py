"""How rounding one group of linears to 4 bits changes a model's predictions, for each group.

A layer is loaded once. The unrounded stream and all streams that passed a rounded group earlier go through it
unchanged. For each of its groups one more stream begins, which goes through the layer with that group rounded. L layers
of 4 groups cost about 2 L^2 passes of the sample through a layer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically, write_json
from autoglm_compress.errors import UserError
from autoglm_compress.forward.activations import linear_of
from autoglm_compress.forward.divergence import Divergence
from autoglm_compress.forward.features import embedded
from autoglm_compress.forward.one_layer_model import OneLayerModel
from autoglm_compress.forward.walk import walk
from autoglm_compress.quantization.bit_allocation import Group
from autoglm_compress.quantization.grid import clipped_grid
from autoglm_compress.runtime import Runtime

SAMPLE_TOKENS = 512
STREAMS = "streams.safetensors"


def stream_bytes(shape: ModelShape, groups: int) -> int:
    """Bytes of the streams of so many groups and of the unrounded stream. Each is held in memory twice and on disk
    twice.
    """
    return (1 + groups) * SAMPLE_TOKENS * shape.hidden_size * torch.float32.itemsize


@torch.no_grad()
def divergences(
    checkpoint: Checkpoint,
    quantization: Quantization,
    groups: Sequence[Group],
    batches: list[torch.Tensor],
    runtime: Runtime,
    file: Path,
) -> list[float]:
    """Mean KL(whole || one group rounded) of next-token distributions over SAMPLE_TOKENS tokens, in nats, per group.

    Args:
        checkpoint: the unquantized model.
        quantization: how the groups are rounded.
        groups: in the order in which the model runs.
        batches: token ids [batch, length]; the first rows are used.
        runtime: where to compute.
        file: where the result is kept, so that a run that is killed later does not measure again. A run that is killed
            here continues at the layer it had reached, from files beside it.

    Raises:
        UserError: the predictions are not finite.
    """
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    rows = torch.cat(batches)[:, :SAMPLE_TOKENS]
    rows = rows[: max(1, SAMPLE_TOKENS // rows.shape[1])]
    # In fp32 also on a GPU: 16-bit noise is as large as the effect of rounding most groups.
    dtype = torch.float32
    folder, device = file.with_suffix(""), runtime.device
    [reference] = walk(checkpoint, [rows], None, runtime=runtime.alone(), title="reference", dtype=dtype, folder=folder)
    divergence = Divergence(checkpoint, reference, device)
    model = OneLayerModel(checkpoint, device, dtype)
    layers, reached, kept = checkpoint.shape.num_hidden_layers, 0, folder / STREAMS
    if kept.exists():
        resumed = load_file(kept, device=str(device))
        reached, (stream, *perturbed) = int(resumed["layers"]), resumed["streams"].unbind()
    else:
        stream = model.to_compute(embedded(checkpoint, rows, checkpoint.read(checkpoint.family.embedding)))
        perturbed = []
    with runtime.progress.task("measure what 4 bits cost", total=layers, unit="layers", reached=reached) as advance:
        for layer in range(reached, layers):
            module, run = model.load(layer)
            perturbed = [run(other, rows) for other in perturbed]
            prefix = checkpoint.family.layer_prefix(layer)
            for group in groups:
                if group.layer != layer:
                    continue
                linears = {name: linear_of(module, name.removeprefix(prefix)) for name in group.linears}
                with rounded(linears, quantization.schemes, checkpoint.dtype):
                    perturbed.append(run(stream, rows))
            stream = run(stream, rows)
            streams = torch.stack([stream, *perturbed]).cpu()
            save_atomically(kept, {"streams": streams, "layers": torch.tensor(layer + 1)})
            advance(1)
    found = [float(value) for value in divergence.of(torch.stack(perturbed)).clamp(min=0)]
    if not all(map(isfinite, found)):
        raise UserError(
            f"{checkpoint.folder}: predictions are NaN or infinite for some calibration tokens: the model overflows in "
            f"{checkpoint.dtype} or its weights are damaged."
        )
    write_json(file, found)
    return found


@contextmanager
def rounded(
    linears: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> Iterator[None]:
    """Let linears compute with rounded weights while the context is open."""
    kept = {name: linear.weight for name, linear in linears.items()}
    for name, linear in linears.items():
        weight = linear.weight.float()
        grid = clipped_grid(weight, schemes[name], scale_dtype, torch.ones_like(weight[0]))
        linear.weight = nn.Parameter(grid.rounded(weight).to(linear.weight), requires_grad=False)
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = kept[name]
