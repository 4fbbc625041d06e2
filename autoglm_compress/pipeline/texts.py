"""A look at the texts of a recipe before work starts: rows that cannot be read, too little text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoglm_compress.calibration.chat import Chat, chat_text
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.text import documents, locate
from autoglm_compress.calibration.tokens import token_rows, too_little
from autoglm_compress.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from autoglm_compress.errors import UserError
from autoglm_compress.pipeline.plan import Plan
from autoglm_compress.recipe import Recipe


def with_texts(plan: Plan, folder: Path) -> Plan:
    """A plan that also warns of texts, every one of which was read, once stages have seen the model's folder.

    Args:
        plan: from shapes alone.
        folder: the model's. What its tokenizer would make of the texts is not known if it is not there yet.

    Raises:
        UserError: a stage cannot use the model, a file or a row cannot be read, the chat template refuses a row, or a
            text does not fill one row.
    """
    for stage in plan.recipe.stages:
        stage.check_source(folder, plan.recipe.family())
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    return replace(plan, text_warnings=_check(plan.recipe, plan.texts, tokenizer))


def _check(recipe: Recipe, files: Mapping[str, Path | None], tokenizer: Any | None) -> tuple[str, ...]:
    stages, perplexity, warnings = recipe.stages, recipe.evaluation.perplexity, []
    length, seed = recipe.calibration.sequence_length, recipe.calibration.seed
    compares = any(stage.makes_quantized or stage.compares_held_out for stage in stages)
    used = set(files.values()) if compares or any(stage.uses_calibration for stage in stages) else set()
    for path in used - {None}:
        _check_rows(path, tokenizer)
        _count(path, "calibration", tokenizer, 1, length, seed)
    if compares:
        warnings += _nothing_held_out(used, tokenizer, length, seed)
    if "perplexity" in recipe.tasks(len(stages) - 1):
        source = perplexity.source or next(iter(recipe.calibration.rows))
        path = locate(source, recipe.bases, "evaluation.perplexity.source")
        if path is not None and path not in used:
            _check_rows(path, tokenizer)
        rows = _count(path, "held-out", tokenizer, perplexity.samples, perplexity.sequence_length, recipe.seed)
        if rows < perplexity.samples:
            warnings.append(f"perplexity: {source} fills only {rows} of {perplexity.samples} samples")
    return tuple(warnings)


def _check_rows(path: Path, tokenizer: Any | None) -> None:
    """Read all rows of a file, chats through the template, which may refuse any of them."""
    for split in ("calibration", "held-out"):
        for document in documents(path, split):
            if tokenizer is not None and isinstance(document, Chat):
                chat_text(tokenizer, document)


def _count(path: Path | None, split: Split, tokenizer: Any | None, samples: int, length: int, seed: int) -> int:
    """How many of so many rows of so many tokens a text fills, all of them as far as it is known without a tokenizer.

    Raises:
        UserError: not one.
    """
    if tokenizer is not None:
        return len(token_rows(tokenizer, path, split, samples, length, seed))
    if path is not None and not documents(path, split):
        raise too_little(path, split, 0, length)
    return samples


def _nothing_held_out(paths: set[Path | None], tokenizer: Any | None, length: int, seed: int) -> list[str]:
    """A warning if no source has a row to check a quantized checkpoint on that it was not calibrated on."""
    problems = []
    for path in paths:
        try:
            _count(path, "held-out", tokenizer, 1, length, seed)
        except UserError as error:
            problems.append(str(error))
    if len(problems) < len(paths):
        return []
    return [f"the check of quantized checkpoints and exports is on calibration rows: {problems[0]}"]
