"""What model families look like, as data, and the arithmetic on their shapes."""

from autoglm_compress.architecture.family import (
    Family,
    TensorAxes,
    UnsupportedArchitectureError,
    family_of,
    supported_architectures,
)
from autoglm_compress.architecture.quantization import Quantization, Scheme
from autoglm_compress.architecture.shape import ModelShape, resized_config

__all__ = [
    "Family",
    "ModelShape",
    "Quantization",
    "Scheme",
    "TensorAxes",
    "UnsupportedArchitectureError",
    "family_of",
    "resized_config",
    "supported_architectures",
]
