"""Model families as data, and the arithmetic on their shapes."""

from autoglm_compress.architecture.family import Family, Place, TensorAxes
from autoglm_compress.architecture.family_files import (
    UnsupportedArchitectureError,
    family_of,
    family_within,
    named_family,
    read_family,
    require_used,
    supported_architectures,
)
from autoglm_compress.architecture.quantization import Quantization, Scheme
from autoglm_compress.architecture.shape import ModelShape
from autoglm_compress.architecture.sizes_in_config import resized_config
from autoglm_compress.architecture.tower import Tower, packed_linears, towers_of

__all__ = [
    "Family",
    "ModelShape",
    "Place",
    "Quantization",
    "Scheme",
    "TensorAxes",
    "Tower",
    "UnsupportedArchitectureError",
    "family_of",
    "family_within",
    "named_family",
    "packed_linears",
    "read_family",
    "require_used",
    "resized_config",
    "supported_architectures",
    "towers_of",
]
