"""Whatever the configuration, an identity has the logits that plain transformers has of the source, or a refusal.

`benchmarks/drawn_configs.py` draws the same by the hundred.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from support.drawn_models import CONTEXT, FAMILIES, DrawnModel, drawn_models
from support.evaluating import make_tokenizer
from support.own_logits import PASS, REFUSED, UNLOADED, Outcome, outcome

torch.set_num_threads(1)
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def outcome_of(drawn: DrawnModel) -> Outcome:
    """Build a model in a folder that is then gone."""
    with TemporaryDirectory() as name:
        folder = drawn.build(Path(name) / "model")
        make_tokenizer().save_pretrained(folder)
        return outcome(folder, Path(name) / "work", CONTEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_wrote_passes(family: str):
    @few
    @given(drawn_models((family,)))
    def check(drawn: DrawnModel) -> None:
        assert outcome_of(drawn) == Outcome(PASS)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_edited_passes_or_is_refused(family: str):
    @few
    @given(drawn_models((family,), edits=3))
    def check(drawn: DrawnModel) -> None:
        found = outcome_of(drawn)
        assert found.kind in (PASS, REFUSED, UNLOADED), found.reason

    check()
