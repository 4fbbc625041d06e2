"""The versions that results depend on."""

import platform
from functools import cache
from importlib.metadata import version

PACKAGES = ("autoglm-compress", "torch", "transformers", "safetensors", "compressed-tensors", "lm-eval")


def result_versions() -> dict[str, str]:
    """The versions of the packages that compute: others may round in another way."""
    return {package: package_versions()[package] for package in ("torch", "transformers")}


@cache
def package_versions() -> dict[str, str]:
    """The versions of this package, of those that results depend on, and of Python."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
