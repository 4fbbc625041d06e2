"""The stages a recipe can chain. Other packages add theirs under the entry point group `autoglm_compress.stages`."""

from autoglm_compress.errors import PlanError
from autoglm_compress.stages.base import Makes, SharedContext, Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.registry import broken_stages, stage_types

__all__ = ["Makes", "Needs", "PlanError", "SharedContext", "Stage", "StageContext", "broken_stages", "stage_types"]
