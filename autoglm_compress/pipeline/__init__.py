"""Running a recipe: the plan, the stages in order, and the files of a run."""

from autoglm_compress.pipeline.plan import Plan, plan_recipe
from autoglm_compress.pipeline.run import RunOptions, run_recipe
from autoglm_compress.pipeline.texts import with_texts

__all__ = ["Plan", "RunOptions", "plan_recipe", "run_recipe", "with_texts"]
