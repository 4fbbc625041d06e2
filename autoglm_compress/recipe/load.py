"""From a recipe file to a validated recipe, or to a list of everything that is wrong with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from autoglm_compress.checked import checked
from autoglm_compress.errors import UserError, suggestion
from autoglm_compress.evaluation.evaluate import check_tasks
from autoglm_compress.problems import FieldPath, Problem, RecipeError, from_validation
from autoglm_compress.recipe.document import assign, override, read_document
from autoglm_compress.recipe.schema import SOURCE, Recipe, RecipeHeader
from autoglm_compress.shipped import find_recipe
from autoglm_compress.stages import Makes, Stage, broken_stages, stage_types


@checked
def load_recipe(
    recipe: Annotated[str | Path, "the name of a recipe or the path of a file"],
    changes: Annotated[str | Sequence[str] | Mapping[str, Any], "values by path, or texts such as 'seed=1'"] = (),
) -> Recipe:
    """Read, change and validate a recipe.

    Args:
        recipe: the name of a recipe that comes with the package, or the path of a file. A name wins over a file that is
            called the same; a Path is never a name.
        changes: of fields, by dotted paths in which a stage goes by its name or number: values by path, such as
            `{"stages.depth.num_hidden_layers": 28}`, or texts as `--set` takes them, with a value in YAML, or
            one such text.

    Raises:
        UserError: an argument is of a wrong type, the file cannot be read, or a change cannot be made.
        RecipeError: the recipe is not valid; the message lists every problem.
    """
    file = find_recipe(recipe)
    document = read_document(file)
    if isinstance(changes, Mapping):
        for key, value in changes.items():
            assign(document, key, str(value) if isinstance(value, Path) else value, f"{key}={value}")
    else:
        for assignment in [changes] if isinstance(changes, str) else changes:
            override(document, assignment)
    problems: list[Problem] = []
    header = _validate(RecipeHeader, document.data, (), problems)
    entries = document.data.get("stages")
    entries = entries if isinstance(entries, list) else []  # the header's validation has reported the error
    stages = [_stage(entry, ("stages", number), problems) for number, entry in enumerate(entries)]
    parents = _parents(stages, [_label(entry) for entry in entries], problems)
    problems += _task_problems(stages, header)
    if problems:
        raise RecipeError(file, problems, document.locations)
    return Recipe(
        files=document.files,
        stages=tuple(stage for stage in stages if stage is not None),
        parents=parents,
        locations=document.locations,
        **{name: getattr(header, name) for name in ("name", "model", "calibration", "evaluation", "keep", "seed")},
    )


def _validate(model: type[BaseModel], data: Any, path: FieldPath, problems: list[Problem]) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems += from_validation(error, path, model)
        return None


def _stage(entry: Any, path: FieldPath, problems: list[Problem]) -> Stage | None:
    """A stage, or None if it is not valid."""
    if not isinstance(entry, dict):
        return None  # the header's validation has reported it
    kind = entry.get("stage")
    if kind is None:
        problems.append(Problem(path, f"missing stage: {suggestion('', stage_types())}"))
    elif isinstance(kind, str) and kind in broken_stages():
        message = f"the plug-in that brings {kind!r} is broken: {broken_stages()[kind]}. Repair or update that package"
        problems.append(Problem((*path, "stage"), message))
    elif not isinstance(kind, str) or kind not in stage_types():
        problems.append(Problem((*path, "stage"), f"unknown stage {kind!r}: {suggestion(str(kind), stage_types())}"))
    else:
        return _validate(stage_types()[kind], entry, path, problems)
    return None


def _label(entry: Any) -> str | None:
    """The name of a stage, valid or not."""
    name = (entry.get("name") or entry.get("stage")) if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _parents(
    stages: Sequence[Stage | None], labels: Sequence[str | None], problems: list[Problem]
) -> tuple[int | None, ...]:
    """The parent of each stage, with a problem for each stage that cannot take it. Invalid stages are skipped."""
    parents: list[int | None] = []
    quantized: list[bool] = []
    by_label: dict[str, int] = {}
    latest: int | None = None
    for number, (stage, label) in enumerate(zip(stages, labels, strict=True)):
        path: FieldPath = ("stages", number)
        parent = latest
        if stage is not None and stage.source is not None:
            parent = by_label.get(stage.source)
            makes = parent is not None and _makes_checkpoint(stages[parent])
            parent = parent if makes else None
            if not makes and stage.source != SOURCE:
                known = [SOURCE, *(name for name, other in by_label.items() if _makes_checkpoint(stages[other]))]
                hint = suggestion(stage.source, known)
                problems.append(
                    Problem((*path, "from"), f"no stage before this one makes a checkpoint {stage.source!r}: {hint}")
                )
        if label == SOURCE:
            problems.append(Problem(path, f"the name {SOURCE!r} stands for the model itself: choose another"))
        if label in by_label:
            first = by_label[label] + 1
            problems.append(
                Problem(
                    path,
                    f"a second stage is called {label!r} (the first is stage {first}): "
                    "give it a name of its own with name:",
                )
            )
        before = None if parent is None else stages[parent]
        given = parent is not None and quantized[parent]
        if stage is not None and before is not None and given and not stage.reads_quantized:
            problems.append(
                Problem(
                    path,
                    f"{stage.stage} cannot take the quantized checkpoint of {before.label!r}: "
                    "move it before that stage, or name another checkpoint with from:",
                )
            )
        parents.append(parent)
        quantized.append(stage is not None and (stage.makes_quantized or given))
        if label is not None:
            by_label.setdefault(label, number)
        if _makes_checkpoint(stage):
            latest = number
    return tuple(parents)


def _makes_checkpoint(stage: Stage | None) -> bool:
    return stage is None or stage.makes is Makes.CHECKPOINT


def _task_problems(stages: Sequence[Stage | None], header: RecipeHeader | None) -> list[Problem]:
    asked: list[tuple[FieldPath, tuple[str, ...]]] = (
        [(("evaluation", "every_stage"), header.evaluation.every_stage)] if header else []
    )
    asked += [(("stages", n, "tasks"), s.evaluates) for n, s in enumerate(stages) if s is not None and s.evaluates]
    problems = []
    for path, tasks in asked:
        if "generate" in tasks and header is not None and header.evaluation.generate.data is None:
            missing = "generate has no rows: name a .jsonl file of chats with answers in evaluation.generate.data"
            problems.append(Problem(path, missing))
        try:
            check_tasks(tasks)
        except UserError as error:
            problems.append(Problem(path, str(error)))
    return problems
