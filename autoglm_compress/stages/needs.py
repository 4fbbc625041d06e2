"""The needs of a stage, for `plan`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Upper estimates of what a stage needs.

    Attributes:
        memory: bytes of the most that the stage holds at a time, beside the process itself. A stage that only writes
            the checkpoint gives 0.
        scratch: bytes of disk that the stage uses only while it works; 0 if these are only a walk's own states.
        fan_in: inputs of the largest linear that the stage changes by the inputs' correlations; 0 if there is none.
        artifact: bytes of the files it writes that are no checkpoint.
    """

    memory: int = 0
    scratch: int = 0
    fan_in: int = 0
    artifact: int = 0
