"""Checks of a recipe's texts before work starts: rows that cannot be read, too little text."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from autoglm_compress.calibration.answers import held_out_answers
from autoglm_compress.calibration.chat import Chat
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.reader import Reader, reader_of
from autoglm_compress.calibration.run_text import can_be_divided
from autoglm_compress.calibration.text import documents, locate, media_chats
from autoglm_compress.calibration.tokens import file_title, token_rows, too_little
from autoglm_compress.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.checks import RowChecks
from autoglm_compress.evaluation.run_results import find_data
from autoglm_compress.pipeline.plan import Plan
from autoglm_compress.recipe import Recipe


def with_texts(plan: Plan, folder: Path) -> Plan:
    """A plan with warnings about the texts, after stages have seen the model's folder and all texts were read.

    Args:
        plan: from shapes alone.
        folder: the model's folder. Without a tokenizer in it, texts are read but not cut into tokens.

    Raises:
        UserError: a stage cannot use the model, a file or a row cannot be read, the chat template refuses a row, or a
            text does not fill one row.
    """
    for stage in plan.recipe.stages:
        stage.check_source(folder, plan.recipe.family())
    family = plan.checkpoints[0].shape.family
    reader = reader_of(folder, family, load_tokenizer(folder)) if has_tokenizer(folder) else None
    kinds = _media(path for path in plan.texts.values() if path is not None)
    shown = _check_evaluated(plan, reader)
    if kinds and any(getattr(stage, "data", None) == "teacher_samples" for stage in plan.recipe.stages):
        raise UserError(
            f"calibration.source: rows with {' and '.join(sorted(kinds))}, and data: teacher_samples continues text "
            "alone: heal with data: calibration, or give rows of text."
        )
    for stage in plan.recipe.stages:
        if missing := [kind for kind in stage.reads_media if kind not in kinds]:
            raise UserError(
                f"calibration.source: no row has an {' or an '.join(missing)} part, and {stage.label} needs rows with "
                f"{' and '.join(stage.reads_media)} parts: name a .jsonl file of such rows."
            )
    return replace(
        plan.with_towers(calibrated=bool(kinds), evaluated=shown),
        text_warnings=(*_check(plan.recipe, plan.texts, reader), *_unseen(plan.recipe, reader, kinds)),
    )


def _check_evaluated(plan: Plan, reader: Reader | None) -> bool:
    """Whether towers see or hear something of the rows that are scored. Reads all of them."""
    recipe = plan.recipe
    data = find_data(recipe.evaluation, recipe.bases, default_text=next(iter(plan.texts.values())))
    checks = RowChecks(recipe.evaluation, data, reader, plan.longest, recipe.seed)
    return checks.check(recipe.tasks(len(recipe.stages) - 1))


def _check(recipe: Recipe, files: Mapping[str, Path | None], reader: Reader | None) -> tuple[str, ...]:
    stages, perplexity, warnings = recipe.stages, recipe.evaluation.perplexity, []
    length, seed, title = recipe.calibration.sequence_length, recipe.calibration.seed, recipe.calibration.title
    compares = any(stage.makes_quantized or stage.compares_held_out for stage in stages)
    used = set(files.values()) if compares or any(stage.uses_calibration for stage in stages) else set()
    for file in {path for path in used if path is not None}:
        _check_rows(file, reader)
        _count(file, "calibration", reader, 1, length, seed, title(file))
    divided = {path for path in used if can_be_divided(path, reader, longest_rows(recipe), seed)}
    if compares and not divided:
        warnings += _nothing_held_out(recipe, used, reader)
    if any(stage.holds_out_samples or stage.trains_on_calibration for stage in stages):
        warnings += _nothing_decides(files, divided)
    if "perplexity" in recipe.tasks(len(stages) - 1):
        source, path = next(iter(files.items()))
        named = title(path)
        if perplexity.source is not None:
            source, path = perplexity.source, locate(perplexity.source, recipe.bases, "evaluation.perplexity.source")
            named = file_title(path)
        if perplexity.answers and path is not None:
            rows = len(held_out_answers(path, perplexity.samples, recipe.seed))
        else:
            if path is not None and path not in used:
                _check_rows(path, reader)
            rows = _count(path, "held-out", reader, perplexity.samples, perplexity.sequence_length, recipe.seed, named)
        if rows < perplexity.samples:
            warnings.append(f"perplexity: {source} fills only {rows} of {perplexity.samples} samples")
    return tuple(warnings)


def _media(paths: Iterable[Path]) -> set[str]:
    """The types of parts that are files, of all rows of some texts."""
    return {kind for path in paths for chat in media_chats(path) for kind in chat.media}


def _unseen(recipe: Recipe, reader: Reader | None, kinds: Collection[str]) -> list[str]:
    """A warning if a model sees or hears, and no row has anything for it to see or hear."""
    if reader is None or reader.media is None or not any(stage.uses_calibration for stage in recipe.stages):
        return []
    missing = [kind for kind in reader.media.kinds if kind not in kinds]
    if not missing:
        return []
    return [
        f"calibration: no row has an {' or '.join(missing)} part: what stays and what it is fitted to is decided by "
        "other rows alone, and the model's answers to such parts suffer most"
    ]


def longest_rows(recipe: Recipe) -> int:
    """Tokens of the longest rows that are cut from the calibration sources."""
    trained = (getattr(stage, "sequence_length", None) for stage in recipe.stages if stage.trains_on_calibration)
    return max([recipe.calibration.sequence_length, *(length or 0 for length in trained)])


def _nothing_decides(files: Mapping[str, Path | None], divided: Collection[Path | None]) -> list[str]:
    """A warning if sources are too short to set documents apart that decide about fits."""
    short = [source for source, path in files.items() if path not in divided]
    if not short:
        return []
    named = f"{', '.join(short)}: too little text to keep documents for deciding about fits"
    if divided:
        return [f"{named}: the other sources alone decide"]
    return [f"{named}: some rows decide that are also fitted to. Give more text or a smaller sequence_length"]


def _check_rows(path: Path, reader: Reader | None) -> None:
    """Read all rows of a file. Chats go through the template, images and sounds through the processor."""
    for split in ("calibration", "held-out"):
        for document in documents(path, split):
            if reader is not None and isinstance(document, Chat):
                reader.ids(document)


def _count(
    path: Path | None, split: Split, reader: Reader | None, samples: int, length: int, seed: int, title: str
) -> int:
    """How many rows of so many tokens a text fills, up to a number. Without a reader, that number.

    Raises:
        UserError: not one.
    """
    if reader is not None:
        return len(token_rows(reader, path, split, samples, length, seed, title))
    if path is not None and not documents(path, split):
        raise too_little(title, split, 0, length)
    return samples


def _nothing_held_out(recipe: Recipe, paths: set[Path | None], reader: Reader | None) -> list[str]:
    """A warning if no source has a row outside the calibration text to check a quantized checkpoint on."""
    calibration, problems = recipe.calibration, []
    for path in paths:
        try:
            _count(path, "held-out", reader, 1, calibration.sequence_length, calibration.seed, calibration.title(path))
        except UserError as error:
            problems.append(str(error))
    if len(problems) < len(paths):
        return []
    return [f"the check of quantized checkpoints and exports is on calibration rows: {problems[0]}"]
