"""The needs of a stage, for `plan`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Upper estimates of what a stage needs.

    Attributes:
        memory: bytes beside a walk, or beside the tensors that the stage rewrites.
        scratch: bytes of disk that the stage uses only while it works; 0 if these are only a walk's own states.
        whole_models: bytes for a stage that holds whole models rather than a layer at a time; 0 for the others.
        fan_in: inputs of the largest linear that the stage changes by the inputs' correlations; 0 if there is none.
        artifact: bytes of the files it writes that are no checkpoint.
    """

    memory: int = 0
    scratch: int = 0
    whole_models: int = 0
    fan_in: int = 0
    artifact: int = 0
