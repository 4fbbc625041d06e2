"""From a recipe file to a validated recipe, or to a list of everything that is wrong with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.evaluate import check_tasks
from autoglm_compress.recipe.document import override, read_document
from autoglm_compress.recipe.problems import FieldPath, Problem, RecipeError, from_validation, suggestion
from autoglm_compress.recipe.schema import Recipe, RecipeHeader
from autoglm_compress.stages import Stage, stage_types
from autoglm_compress.stages.evaluate import Evaluate


def load_recipe(file: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Raises:
        UserError: the file cannot be read, or an override cannot be applied.
        RecipeError: the recipe is not valid; the message lists every problem.
    """
    document = read_document(file)
    for assignment in assignments:
        override(document, assignment)
    problems: list[Problem] = []
    header = _validate(RecipeHeader, document.data, (), problems)
    stages = _stages(document.data.get("stages"), problems)
    if not problems:
        parents = _parents(stages, problems)
        problems += _task_problems(stages, header)
    if problems:
        raise RecipeError(file, problems, document.locations)
    return Recipe(
        file=file.resolve(),
        stages=stages,
        parents=parents,
        locations=document.locations,
        **{name: getattr(header, name) for name in ("name", "model", "calibration", "evaluation", "seed")},
    )


def _validate(model: type[BaseModel], data: Any, path: FieldPath, problems: list[Problem]) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems += from_validation(error, path, model)
        return None


def _stages(entries: Any, problems: list[Problem]) -> tuple[Stage, ...]:
    if not isinstance(entries, list):
        return ()  # the header's validation has said so
    stages = []
    for number, entry in enumerate(entries):
        path: FieldPath = ("stages", number)
        if not isinstance(entry, dict):
            continue
        kind = entry.get("stage")
        if kind is None:
            problems.append(Problem(path, f"missing stage: {suggestion('', stage_types())}"))
        elif kind not in stage_types():
            problems.append(
                Problem((*path, "stage"), f"unknown stage {kind!r}: {suggestion(str(kind), stage_types())}")
            )
        else:
            stages.append(_validate(stage_types()[kind], entry, path, problems))
    return tuple(stages)


def _parents(stages: Sequence[Stage], problems: list[Problem]) -> tuple[int | None, ...]:
    """Whose checkpoint each stage takes, and whether it can."""
    parents: list[int | None] = []
    by_label: dict[str, int] = {}
    latest: int | None = None
    for number, stage in enumerate(stages):
        path: FieldPath = ("stages", number)
        parent = latest
        if stage.source is not None:
            parent = by_label.get(stage.source)
            if parent is None:
                known = f"there are {', '.join(by_label)}" if by_label else "it is the first"
                problems.append(Problem((*path, "from"), f"no stage {stage.source!r} before this one; {known}"))
        if stage.label in by_label:
            first = by_label[stage.label] + 1
            problems.append(
                Problem(
                    path,
                    f"a second stage is called {stage.label!r} (the first is stage {first}): "
                    "give it a name of its own with name:",
                )
            )
        if parent is not None and stages[parent].makes_quantized and not stage.reads_quantized:
            problems.append(
                Problem(
                    path,
                    f"{stage.stage} cannot take the quantized checkpoint of {stages[parent].label!r}: "
                    "move it before that stage, or name another checkpoint with from:",
                )
            )
        parents.append(parent)
        if stage.makes_checkpoint:
            by_label[stage.label] = latest = number
    return tuple(parents)


def _task_problems(stages: Sequence[Stage], header: RecipeHeader) -> list[Problem]:
    asked = [(("evaluation", "every_stage"), header.evaluation.every_stage)]
    asked += [(("stages", n, "tasks"), s.tasks) for n, s in enumerate(stages) if isinstance(s, Evaluate)]
    problems = []
    for path, tasks in asked:
        try:
            check_tasks(tasks)
        except UserError as error:
            problems.append(Problem(path, str(error)))
    return problems
