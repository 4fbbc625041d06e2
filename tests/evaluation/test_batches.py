"""Rows that begin alike are sent through a model as one sequence that forks: nothing may come out differently."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.batches import Batch, in_batches
from autoglm_compress.forward.one_layer_model import final_norm
from autoglm_compress.forward.walk import walk
from support.models import FAMILIES
from support.quiet import quiet
from support.running import load, logits

rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12, unique=True)


@settings(max_examples=200, deadline=None)
@given(rows=rows, budget=st.integers(1, 30), window=st.none() | st.integers(1, 12))
def test_every_row_is_in_one_batch_where_the_batch_says(rows, budget, window):
    batches = list(in_batches(rows, budget, window))
    assert sorted(row for batch in batches for row in batch.rows) == sorted(rows)
    for batch in batches:
        tokens = batch.tokens
        assert tokens.numel() == batch.size
        assert batch.size <= max(budget, 2 * batch.shared) or len(batch.rows) == 1
        assert not (batch.shared and window and max(map(len, batch.rows)) > window)
        for line, row in enumerate(batch.rows):
            assert tuple(int(tokens[batch.spot(line, place)]) for place in range(len(row))) == row


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_forks_gives_what_each_of_its_branches_gives_alone(
    family: str, make_checkpoint: Callable[..., Path]
):
    folder = make_checkpoint(family)
    shared = (5, 9, 2, 7)  # with the longest rest, as long as the sliding windows of the families that have one
    batch = Batch((shared, (*shared, 1, 3, 8), (*shared, 1, 4), (*shared, 6, 6, 6, 6)), len(shared))
    checkpoint, device = Checkpoint(folder), torch.device("cpu")
    [states] = walk(checkpoint, [batch.tokens], None, runtime=quiet(), title="", forks=[batch.fork])
    found = final_norm(checkpoint, device)(states) @ checkpoint.head_weight().float().T
    model = load(folder)
    for line, row in enumerate(batch.rows):
        expected = logits(model, torch.tensor([row]))[0]
        for place in range(len(row)):
            torch.testing.assert_close(found[batch.spot(line, place)], expected[place], rtol=1e-4, atol=1e-4)
