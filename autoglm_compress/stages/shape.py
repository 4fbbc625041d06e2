"""Find the sizes for a target that says only how large the result may be, and cut to them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.architecture.loading_rules import likely_refusal, refusal
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.errors import PlanError
from autoglm_compress.evaluation.costs import agreement_memory
from autoglm_compress.figures import Record
from autoglm_compress.forward.hidden_states import buffer_bytes
from autoglm_compress.records.files import CHOSEN
from autoglm_compress.shaping.chosen import chosen_recipe, write_chosen
from autoglm_compress.shaping.grid import Grid, grid_of
from autoglm_compress.shaping.removed import DEPTH_METHODS, removed
from autoglm_compress.shaping.search import MOST_MEASURED, Found, even_place, find_shape
from autoglm_compress.shaping.target import Target
from autoglm_compress.stages.base import Stage, StageContext, require_alike_layers
from autoglm_compress.stages.ffn import neuron_scores
from autoglm_compress.stages.head_choice import head_scores
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.shape import shape_plot
from autoglm_compress.stages.shape_trials import MEASURED_TOKENS, Trials, explicit
from autoglm_compress.stages.surgeries import Refuses, cut, surgeries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shape(Stage):
    """Cut layers, FFN, heads and width to a target size, each as far as costs the predictions least.

    The statistics say in closed form what each size removes. A few models that are cut along one size alone say what
    that costs: the KL divergence of the next-token distributions on rows that nothing is fitted to. The shape with the
    least total cost within the target is found among all, really cut and measured, and so are others; each measurement
    corrects the costs by which the next one is chosen. The best measured one is the result.

    Sizes are multiples of `multiple_of`, or of the target's `group_size`, or else of the largest of 128, 64, 32, 16 and
    8 that divides what there is into eight parts or more. No size is cut to less than a quarter. The surgeries are done
    in an order in which `transformers` loads what is between them, and `recipe.yaml` beside the result lists them.
    """

    stage: Literal["shape"]
    target: Target
    multiple_of: Annotated[int, Field(strict=True, gt=0)] | None = None

    @property
    def uses_calibration(self) -> bool:
        """Always: what a size costs is measured."""
        return True

    @property
    def holds_out_samples(self) -> bool:
        """Some samples decide between shapes."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape within the target that is cut most evenly; the run decides."""
        grid = self._planned_grid(shape)
        place = even_place(grid, self.target.limit(shape))
        assert place is not None  # the smallest is within the target, or this is refused
        return grid.shape(place)

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """The surgeries, the comparison of two checkpoints, and two checkpoints on disk."""
        tokens = min(MEASURED_TOKENS, calibration.tokens)
        steps = surgeries(shape, self.plan(shape), DEPTH_METHODS[0], lambda found: likely_refusal(shape, found)) or ()
        memory = [agreement_memory(shape, tokens)]
        memory += [stage.needs(shape, source, calibration).memory for stage in steps]
        measured = super().needs(shape, source, calibration).memory
        scratch = 2 * shape.bytes + buffer_bytes(source, calibration.tokens)
        return Needs(memory=max(measured, *memory), scratch=scratch)

    def warnings(self, shape: ModelShape) -> list[str]:
        """What is known of the result before the run."""
        grid, target = self._planned_grid(shape), self.target
        limit, present = (target.spelled(amount) for amount in (target.limit(shape), target.size(shape)))
        return [
            f"the run decides the sizes; those shown are of an even cut. Target: {limit} of {present}; least: "
            f"{target.spelled(grid.smallest)}. It cuts and writes {MOST_MEASURED} models at most, one at a time, and "
            f"sends {MEASURED_TOKENS} tokens through each"
        ]

    def _planned_grid(self, shape: ModelShape) -> Grid:
        """The shapes within reach, as far as sizes tell; a config may allow more.

        Raises:
            PlanError: the stage cannot cut this model, or not to the target.
        """
        require_alike_layers(shape, self.stage)
        target, limit = self.target, self.target.limit(shape)
        if limit >= (present := target.size(shape)):
            raise PlanError("target", f"{target.spelled(limit)}: there are {target.spelled(present)}: give less")
        grid = self._grid(shape, lambda found: likely_refusal(shape, found))
        if not (grid.streams and grid.neurons):
            multiple = self.multiple_of or target.multiple
            raise PlanError("multiple_of", f"{multiple}: no sizes of this model are multiples of it: give less")
        if grid.smallest > limit:
            least = target.spelled(grid.smallest)
            raise PlanError(
                "target",
                f"{target.spelled(limit)}: out of reach: {least} is the least, as of every size a quarter is kept",
            )
        return grid

    def _grid(self, shape: ModelShape, refuses: Refuses) -> Grid:
        """The shapes that can be cut to."""
        known: dict[tuple[int, ...], str] = {}
        text = replace(shape, kept=())

        def refused(found: ModelShape) -> str:
            key = (found.num_attention_heads, found.num_key_value_heads, found.hidden_size)
            if key not in known:
                known[key] = refuses(found)
            return known[key]

        def possible(found: ModelShape) -> bool:
            return surgeries(text, found, DEPTH_METHODS[0], refused) is not None

        return grid_of(shape, self.multiple_of or self.target.multiple, self.target.size, possible)

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """What the measured shapes cost."""
        return shape_plot(record)

    def run(self, context: StageContext) -> None:
        """Search, cut, and write the surgeries as a recipe."""
        source, config = context.source, context.source.whole_config
        present = refusal(config, source.shape)

        def refuses(shape: ModelShape) -> str:
            found = refusal(config, shape)
            return "" if found == present else found

        grid = self._grid(source.shape, refuses)
        trials = Trials(context, grid, refuses)
        layers = range(source.shape.num_hidden_layers)
        shares = removed(
            grid,
            source,
            context.lineage,
            context.statistics(),
            [neuron_scores(context, "contribution", layer) for layer in layers],
            [head_scores(context, "contribution", layer) for layer in layers],
        )
        found = find_shape(grid, shares, self.target.limit(source.shape), trials.measure)
        steps = trials.steps(found.best.place, found.depth_method)
        done = cut(context, steps, context.work / "chosen", context.result)
        context.shape, context.lineage = done[-1].shape, done[-1].lineage
        stages = [explicit(stage) for stage in steps]
        chosen = [{"options": own, "decisions": step.decisions} for own, step in zip(stages, done, strict=True)]
        context.decisions = self._decisions(grid, found) | {"stages": chosen}
        recipe: dict[str, Any] = {"stages": stages}
        if not context.made_by_the_run:
            recipe = chosen_recipe(f"{self.label}-by-hand", source.folder, context.text, context.seed, stages)
        write_chosen(context.result / CHOSEN, recipe)

    def _decisions(self, grid: Grid, found: Found) -> dict[str, Any]:
        """What was measured and chosen, as plain data."""
        target = self.target
        return {
            "limit": target.limit(grid.source),
            "size": target.size(grid.shape(found.best.place)),
            "depth_method": found.depth_method,
            "costs": {axis.name: axis.as_data() for axis in found.axes},
            "trials": [
                {
                    "sizes": grid.shape(trial.place).cut_sizes,
                    "expected": float(f"{trial.expected:.4g}"),
                    "kl_divergence": float(f"{trial.divergence:.4g}"),
                }
                for trial in found.trials
            ],
        }
