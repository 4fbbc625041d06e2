"""The schema of a recipe."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoglm_compress.architecture import Family, named_family, read_family
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.evaluation.options import EvaluationOptions
from autoglm_compress.stages import Stage

SOURCE = "source"
"""The name of the run's source among its checkpoints. A stage takes it with `from: source`."""


Keep = Literal["all", "last", "none"]
"""Which intermediate checkpoints stay when no stage needs them any more."""


class ModelOptions(BaseModel):
    """The model to compress, as a folder or a hub id, and the YAML file of its family if the user brings one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    family: str | None = Field(default=None, min_length=1)


class RecipeHeader(BaseModel):
    """A recipe's top-level keys. Each stage is validated by the class that it names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: ModelOptions
    calibration: CalibrationOptions = CalibrationOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    keep: Keep = "all"
    seed: int = Field(default=0, ge=0)
    stages: list[dict[str, Any]] = Field(min_length=1)


class Recipe(BaseModel):
    """A validated recipe. `parents[i]` is the number of the stage whose checkpoint stage i takes, None the source.

    `files` are its own, its base's, and so on.
    """

    model_config = ConfigDict(frozen=True)

    files: tuple[Path, ...]
    name: str
    model: ModelOptions
    calibration: CalibrationOptions
    evaluation: EvaluationOptions
    keep: Keep
    seed: int
    stages: tuple[Stage, ...]
    parents: tuple[int | None, ...]
    locations: dict[tuple[str | int, ...], str] = Field(exclude=True)

    @property
    def file(self) -> Path:
        """The recipe's own file."""
        return self.files[0]

    @property
    def bases(self) -> list[Path]:
        """The folders in which relative paths are looked up: beside the recipe, beside its bases, and where we are."""
        return list(dict.fromkeys([*(file.parent for file in self.files), Path.cwd()]))

    def family_file(self) -> Path | None:
        """The YAML file of the model's family, if the recipe names one."""
        name = self.model.family
        return None if name is None else named_family(name, self.bases, "model.family")

    def family(self) -> Family | None:
        """The family that this file describes."""
        file = self.family_file()
        return None if file is None else read_family(file)

    def labels(self) -> list[str]:
        """The names of the stages, in order."""
        return [stage.label for stage in self.stages]

    def folder_name(self, number: int) -> str:
        """`NN-name`, the name of a stage's folder."""
        return f"{number + 1:02d}-{self.stages[number].label}"

    def tasks(self, last: int) -> tuple[str, ...]:
        """Every evaluation asked for up to stage number `last`; the source is evaluated on all of them."""
        asked = [*self.evaluation.every_stage]
        for stage in self.stages[: last + 1]:
            asked += stage.evaluates
        return tuple(dict.fromkeys(asked))

    def as_data(self) -> dict[str, Any]:
        """The recipe with all defaults filled in, as plain data for the manifest."""
        data = self.model_dump(mode="json", include={"name", "model", "calibration", "evaluation", "keep", "seed"})
        return data | {"stages": [stage.model_dump(mode="json", by_alias=True) for stage in self.stages]}
