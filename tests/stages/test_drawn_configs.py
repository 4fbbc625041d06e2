"""Stages on models of drawn configurations: what they write loads in plain transformers, and evaluates as it does."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from support.drawn_models import CONTEXT, DrawnModel, drawn_models
from support.evaluating import make_tokenizer
from support.own_logits import all_logits, rows
from support.quiet import quiet
from support.running import EVALUATION, invoke, load, run, stage_folders, write_recipe

torch.set_num_threads(1)
VOCABULARIES = (320, 331)
"""No smaller than the tokenizer's."""
ROUNDED = {"stage": "quantize", "method": "round_to_nearest", "group_size": -1, "max_divergence": 100}


def stages_for(drawn: DrawnModel) -> list[dict[str, Any]]:
    """A cut along every axis, to multiples of 8 where kernels need them, and two quantizations of the result."""
    sizes = drawn.settings
    cut = [
        {"stage": "depth", "layers": [*range(0, sizes["num_hidden_layers"], 2)]},
        {"stage": "ffn", "intermediate_size": sizes["intermediate_size"] - 8},
        {"stage": "heads", "num_attention_heads": 1, "kv_heads": 1},
        {"stage": "width", "hidden_size": max(8, sizes["hidden_size"] // 16 * 8)},
    ]
    if not sizes["tie_word_embeddings"]:
        cut.append({"stage": "tie", "method": "average"})
    last = cut[-1]["stage"]
    return [*cut, ROUNDED | {"name": "int8", "bits": 8}, ROUNDED | {"name": "int4", "bits": 4, "from": last}]


@settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(drawn_models(vocabularies=VOCABULARIES))
def test_what_stages_write_loads_and_evaluates_as_plain_transformers_has_it(drawn: DrawnModel):
    with TemporaryDirectory() as name:
        source = drawn.build(Path(name) / "model")
        make_tokenizer().save_pretrained(source)
        stages = stages_for(drawn)
        run(write_recipe(Path(name), source, stages, evaluation=EVALUATION | {"every_stage": []}))
        made = stage_folders(Path(name) / "out")
        assert len(made) == len(stages)
        for checkpoint in made:
            _evaluates_as_it_loads(checkpoint, rows(VOCABULARIES[0], CONTEXT))
        _agrees_as_it_loads(made[-1], source, Path(name) / "agreement.json")


@torch.no_grad()
def _in_fp32(checkpoint: Path) -> torch.nn.Module:
    """Plain transformers' model, computing in fp32 with weights in their own dtype, as packed ones are unpacked to."""
    model = load(checkpoint, dtype="auto")
    model(torch.tensor([[0]]))  # packed weights are unpacked when they are first used
    return torch.nn.Module.float(model)  # the model's own `float` refuses those that were packed


def _evaluates_as_it_loads(checkpoint: Path, tokens: list[list[int]]) -> None:
    expected = all_logits(_in_fp32(checkpoint), tokens)
    scores = LayerwiseLM(Checkpoint(checkpoint), runtime=quiet(), title="").score(
        [(row[:1], row[1:]) for row in tokens]
    )
    for (value, _), row, logits in zip(scores, tokens, expected, strict=True):
        assert logits.isfinite().all()
        right = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]).sum()
        assert value == pytest.approx(float(right), rel=1e-3)


def _agrees_as_it_loads(checkpoint: Path, source: Path, output: Path) -> None:
    """`evaluate --against` has the divergence between the two models in plain transformers."""
    options = ("--tasks", "perplexity", "--samples", 2, "--sequence-length", 32, "--output", output)
    assert invoke("evaluate", checkpoint, "--against", source, *options).exit_code == 0
    tokens = token_rows(Reader(make_tokenizer()), None, "held-out", 2, 32, 0).tolist()
    expected, found = (
        torch.cat(all_logits(_in_fp32(folder), tokens)).log_softmax(-1) for folder in (source, checkpoint)
    )
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert json.loads(output.read_text())["tasks"]["agreement"]["result"]["divergence"] == pytest.approx(
        divergence, rel=1e-3, abs=1e-6
    )
