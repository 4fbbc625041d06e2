"""A student spread over processes with FSDP2: each holds a part of every weight, gradient and moment."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from autoglm_compress.errors import UserError
from autoglm_compress.healing.model import Student
from autoglm_compress.processes import Processes


def require_equal_parts(batch_size: int, processes: Processes) -> None:
    """Raise UserError if processes cannot have equal parts of a batch."""
    if batch_size % processes.count:
        raise UserError(
            f"batch_size: {batch_size} rows cannot be shared by {processes.count} processes: give a multiple of that."
        )


def shard(student: Student, device_type: str, processes: Processes) -> nn.Module:
    """Shard a student's layers, and the parameters outside them, in place. A single process keeps it whole."""
    if processes.count == 1:
        return student
    mesh = init_device_mesh(device_type, (processes.count,))
    for layer in student.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student
