"""What a stage costs, for `plan`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Upper estimates of what a stage needs.

    Attributes:
        memory: bytes of the most that it holds at a time, beside the process itself; what takes no more than to write
            the checkpoint need not be said.
        scratch: bytes of disk for what is there only while the stage works; 0 where a walk's own states are all.
        fan_in: inputs of the largest linear that the stage changes by how they go together; 0 if it changes none so.
        artifact: bytes of the files it writes that are no checkpoint.
    """

    memory: int = 0
    scratch: int = 0
    fan_in: int = 0
    artifact: int = 0
