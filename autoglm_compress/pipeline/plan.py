"""What a recipe will do, from shapes alone: sizes after every stage, memory, disk, and stages that cannot work."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from autoglm_compress.architecture import Family, ModelShape, require_used
from autoglm_compress.architecture.loading_rules import refusal
from autoglm_compress.calibration.divided_rows import DECIDING_EVERY
from autoglm_compress.calibration.run_text import HELD_OUT_TOKENS, find_sources
from autoglm_compress.calibration.tokens import CalibrationOptions, fitted_rows
from autoglm_compress.checkpoint import config_only
from autoglm_compress.checkpoint.described import DescribedModel, describe
from autoglm_compress.checkpoint.writer import SHARD_BYTES
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.costs import evaluation_memory
from autoglm_compress.forward.costs import freed_memory, rewriting_memory, seeing_memory
from autoglm_compress.forward.hidden_states import buffer_bytes
from autoglm_compress.forward.statistics import SAMPLE_TOKENS
from autoglm_compress.memory_limit import PROCESS_BYTES
from autoglm_compress.pipeline.retention import kept_bytes, most_bytes
from autoglm_compress.problems import FieldPath
from autoglm_compress.recipe import SOURCE, Problem, Recipe, RecipeError
from autoglm_compress.records.plan import PlannedStage, PlanRecord
from autoglm_compress.records.stage import Shape
from autoglm_compress.report.numbers import size
from autoglm_compress.stages import Makes, Needs, PlanError, Stage


@dataclass(frozen=True)
class PlannedCheckpoint:
    """The source, or the checkpoint after one stage. A stage that makes no checkpoint repeats the one before it."""

    name: str
    stage: str
    shape: ModelShape
    peak_memory: int
    disk: int
    warnings: tuple[str, ...]

    def record(self) -> PlannedStage:
        """The sizes, as they are printed."""
        shape = self.shape
        return PlannedStage(
            name=self.name,
            stage=self.stage,
            shape=Shape.of(shape),
            parameters=shape.parameters,
            unique_parameters=shape.unique_parameters,
            parameters_by_part=shape.parameters_by_part(),
            bytes=shape.bytes,
            kv_cache_bytes_per_1000_tokens=shape.kv_cache_bytes(),
            peak_memory_bytes_estimate=self.peak_memory,
            disk_bytes=self.disk,
            warnings=list(self.warnings),
        )


@dataclass(frozen=True)
class Plan:
    """The source and every stage, the file of every calibration source, and the disk the run needs and has.

    `recipe` is the recipe that runs: fields it leaves open are filled in to fit the model. `folder` holds at least the
    model's config. `disk_bytes` is the peak disk use of a whole run. `scratch_bytes` is the part of it that is not
    checkpoints. `kept_bytes` is the size of the checkpoints that stay. `longest` is the most tokens that
    the model reads, None if there is no limit. `with_texts` adds `text_warnings`, which shapes do not tell.
    """

    recipe: Recipe
    folder: Path
    checkpoints: tuple[PlannedCheckpoint, ...]
    texts: Mapping[str, Path | None]
    disk_bytes: int
    scratch_bytes: int
    kept_bytes: int
    free_bytes: int
    longest: int | None = None
    text_warnings: tuple[str, ...] = ()

    def with_towers(self, *, calibrated: bool, evaluated: bool) -> "Plan":
        """The same plan where calibration rows, or those of evaluations, have images or sounds, which towers see before
        a walk begins.

        A stage that reads such rows has all towers then, in fp32 and as they are stored, beside the embedding.
        """
        every_stage, tasks = self.recipe.evaluation.every_stage, self.recipe.tasks(len(self.recipe.stages) - 1)
        source = self.checkpoints[0].shape
        needed = [seeing_memory(source) if evaluated and tasks else 0]
        for entry, stage in zip(self.checkpoints[1:], self.recipe.stages, strict=True):
            asked = stage.evaluates or (stage.makes is Makes.CHECKPOINT and every_stage)
            calibrates = calibrated and (stage.uses_calibration or stage.makes_quantized)
            own = stage.seeing_memory(entry.shape, source, self.recipe.calibration) if calibrates else 0
            needed.append(max(own, seeing_memory(entry.shape) if evaluated and asked else 0))

        def seeing(entry: PlannedCheckpoint, towers: int) -> PlannedCheckpoint:
            return replace(entry, peak_memory=max(entry.peak_memory, PROCESS_BYTES + towers)) if towers else entry

        return replace(self, checkpoints=tuple(map(seeing, self.checkpoints, needed)))

    def require_memory(self, limit: int, stages: Collection[int]) -> None:
        """Raise UserError if some of these stages need more memory than `limit` bytes, by a rough upper estimate."""
        chosen = [self.checkpoints[number + 1] for number in stages]
        beyond = [f"{entry.name}: {size(entry.peak_memory)}" for entry in chosen if entry.peak_memory > limit]
        if beyond:
            listed = "\n  ".join(beyond)
            raise UserError(
                f"--memory-limit: {size(limit)} may not be enough for\n  {listed}\n"
                "Raise the limit, leave these stages out, or choose cheaper options for them, such as logit_passes: 0."
            )

    def stage_warnings(self) -> list[str]:
        """The warnings about stages, each with the stage's name."""
        return [f"{checkpoint.name}: {text}" for checkpoint in self.checkpoints for text in checkpoint.warnings]

    def warnings(self) -> list[str]:
        """All warnings."""
        found = [*self.stage_warnings(), *self.text_warnings]
        if self.disk_bytes > self.free_bytes:
            found.append(f"disk: {size(self.disk_bytes)} needed, {size(self.free_bytes)} free")
        return found

    def record(self) -> PlanRecord:
        """The plan as it is printed."""
        return PlanRecord(
            checkpoints=[checkpoint.record() for checkpoint in self.checkpoints],
            disk_bytes_needed=self.disk_bytes,
            disk_bytes_kept=self.kept_bytes,
            disk_bytes_free=self.free_bytes,
            warnings=self.warnings(),
        )


def _described_source(folder: Path, family: Family | None) -> DescribedModel:
    """The recipe's source, of the family that the recipe gives for it, if it does."""
    found = describe(folder, family)
    require_used(family, found.shape.family, "model.family", str(folder / "config.json"))
    return found


def plan_recipe(recipe: Recipe, output: Path) -> Plan:
    """Plan a recipe, reading no weights.

    Raises:
        RecipeError: a stage cannot work on the shape it would be given; the message lists every such stage.
        UserError: the source is not found or not supported, or calibration text is not there.
    """
    texts = find_sources(recipe.calibration, recipe.bases)
    family, folder = recipe.family(), config_only(recipe.model.source, recipe.bases)
    model = _described_source(folder, family)
    source, config = model.shape, model.config
    longest = getattr(model.text_config, "max_position_embeddings", None)
    recipe = _fitted(recipe, longest)
    tokens = recipe.calibration.tokens
    measured = evaluation_memory(source, recipe.tasks(len(recipe.stages) - 1), recipe.evaluation)
    memory = PROCESS_BYTES + freed_memory(source, recipe.calibration.batch_tokens) + measured if measured else 0
    checkpoints = [PlannedCheckpoint(SOURCE, SOURCE, source, memory, 0, ())]
    shapes: list[ModelShape] = []
    needed: list[Needs] = []
    problems: list[Problem] = []
    lengths: list[tuple[FieldPath, int]] = [
        (("calibration", "sequence_length"), recipe.calibration.sequence_length),
    ]
    if "perplexity" in recipe.tasks(len(recipe.stages) - 1):
        rows = recipe.evaluation.perplexity
        lengths.append((("evaluation", "perplexity", "sequence_length"), rows.sequence_length))
    for number, stage in enumerate(recipe.stages):
        lengths += [(("stages", number, "sequence_length"), getattr(stage, "sequence_length", None) or 0)]
    for path, length in lengths:
        if longest and length > longest:
            problems.append(Problem(path, f"{length}: the model's max_position_embeddings is {longest}"))
    for number, (stage, parent) in enumerate(zip(recipe.stages, recipe.parents, strict=True)):
        before = source if parent is None else shapes[parent]
        try:
            after = stage.plan(before)
            stage.check_calibration(recipe.calibration)
            for option, name in stage.other_checkpoints.items():
                stage.check_other(before, describe(config_only(name, recipe.bases, option), family).shape)
            warnings = stage.warnings(before) + _loader_warnings(before, after)
            warnings += _dropped_sidecar(stage, None if parent is None else recipe.stages[parent])
            needs = stage.needs(before, source, recipe.calibration)
            warnings += _calibration_warnings(recipe.calibration, stage, needs.fan_in)
        except PlanError as error:
            problems.append(Problem(("stages", number, error.option), str(error)))
            after, needs, warnings = before, Needs(), []
        refused = refusal(config, after)
        if refused and refused != refusal(config, before):
            message = f"transformers cannot load what this makes: {refused} Change a size, or the order of the stages"
            problems.append(Problem(("stages", number), message))
        shapes.append(after)
        needed.append(needs)
        checkpoints.append(
            PlannedCheckpoint(
                name=recipe.folder_name(number),
                stage=stage.stage,
                shape=after,
                peak_memory=_peak_memory(recipe, number, needs, before, after),
                disk=needs.artifact + (after.bytes if stage.makes is Makes.CHECKPOINT else 0),
                warnings=tuple(warnings),
            )
        )
    if problems:
        raise RecipeError(recipe.file, problems, recipe.locations)
    scratch = 0
    for stage, needs in zip(recipe.stages, needed, strict=True):
        walked = buffer_bytes(source, tokens) if stage.uses_calibration else 0
        scratch = max(scratch, needs.scratch or walked)
    if scratch:
        # The statistics: a Gram matrix and the states of sampled tokens for each layer.
        per_layer = 4 * source.hidden_size**2 + 2 * SAMPLE_TOKENS * source.hidden_size
        scratch += per_layer * (source.num_hidden_layers + 1)
    scratch += 2 * SHARD_BYTES
    sizes = [checkpoint.disk for checkpoint in checkpoints[1:]]
    return Plan(
        recipe=recipe,
        folder=folder,
        checkpoints=tuple(checkpoints),
        texts=texts,
        disk_bytes=most_bytes(recipe, sizes, range(len(sizes)), ()) + scratch,
        scratch_bytes=scratch,
        kept_bytes=kept_bytes(recipe, sizes),
        free_bytes=free_bytes(output),
        longest=longest,
    )


def _fitted(recipe: Recipe, longest: int | None) -> Recipe:
    """The recipe with row lengths limited to the model's context where the recipe gives no length."""
    evaluation, perplexity = recipe.evaluation, fitted_rows(recipe.evaluation.perplexity, longest)
    changes = {
        "calibration": fitted_rows(recipe.calibration, longest),
        "evaluation": evaluation.model_copy(update={"perplexity": perplexity}),
    }
    return recipe.model_copy(update=changes)


def _loader_warnings(before: ModelShape, after: ModelShape) -> list[str]:
    """Warnings about engines other than transformers that cannot load a new shape."""
    width = after.num_attention_heads * after.head_dim
    same = (after.hidden_size, width) == (before.hidden_size, before.num_attention_heads * before.head_dim)
    if same or width == after.hidden_size or not after.family.vllm_derives_head_dim:
        return []
    return [
        f"hidden_size {after.hidden_size} / {after.num_attention_heads} heads is not head_dim {after.head_dim}: "
        f"transformers loads this, but vLLM's {after.family.model_type} ignores head_dim"
    ]


def _dropped_sidecar(stage: Stage, before: Stage | None) -> list[str]:
    """A warning if the checkpoint that a stage makes is without the file that the stage before wrote beside its own."""
    if before is None or before.sidecar in (None, stage.sidecar) or stage.makes is not Makes.CHECKPOINT:
        return []
    return [f"{before.sidecar} of {before.label} is for its weights alone, and left out: put {before.label} last"]


def _calibration_warnings(calibration: CalibrationOptions, stage: Stage, fan_in: int) -> list[str]:
    """A warning if a stage has too few calibration tokens for linears of so many inputs, with the remedy."""
    samples, length = calibration.samples, calibration.sequence_length
    enough = stage.tokens_per_input * fan_in
    found = []
    if stage.holds_out_samples and samples < DECIDING_EVERY:
        found.append(
            f"of {samples} samples one only decides about fits, which leaves {samples - 1} to fit to: "
            f"raise calibration.samples to {DECIDING_EVERY} or more"
        )
    if samples * length < enough:
        found.append(
            f"{samples} samples x {length} = {samples * length} calibration tokens are few for linears of {fan_in} "
            f"inputs: raise calibration.samples to {ceil(enough / length)} or more"
        )
    return found


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that a folder is or would be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _peak_memory(recipe: Recipe, number: int, needs: Needs, before: ModelShape, after: ModelShape) -> int:
    """An upper estimate of the resident memory of a stage and of what is evaluated after it, in bytes, on a CPU."""
    stage, options = recipe.stages[number], recipe.evaluation
    evaluated = evaluation_memory(before, stage.evaluates, options)
    walked = recipe.calibration.batch_tokens if stage.uses_calibration else HELD_OUT_TOKENS  # at once
    process = PROCESS_BYTES + freed_memory(before, walked)
    if stage.makes is not Makes.CHECKPOINT:
        return process + max(needs.memory, evaluated)
    evaluated = max(evaluated, evaluation_memory(after, options.every_stage, options))
    return process + max(needs.memory, evaluated, rewriting_memory(before, after, SHARD_BYTES))
