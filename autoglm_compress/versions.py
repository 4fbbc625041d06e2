"""The versions that results depend on."""

import platform
from functools import cache
from importlib.metadata import version

PACKAGES = ("autoglm-compress", "torch", "transformers", "safetensors", "compressed-tensors", "lm-eval")


def result_versions() -> dict[str, str]:
    """The versions of the packages that compute. Other versions may round differently."""
    return {package: package_versions()[package] for package in ("torch", "transformers")}


@cache
def package_versions() -> dict[str, str]:
    """The versions of this package, of those that results depend on, and of Python."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def made_elsewhere(then: dict[str, str], label: str) -> str:
    """The notice about a finished stage `label` that was made with the versions `then`."""
    now = result_versions()
    other = [f"{name} {then.get(name)} (here it is {now[name]})" for name in now if then.get(name) != now[name]]
    if not other:
        return ""
    return f", though made with {', '.join(other)}: a new run may give other bytes (--from {label} repeats it)"
