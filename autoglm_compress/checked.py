"""Checking what a Python program passes to the functions of the package."""

import re
from collections.abc import Callable
from functools import cache, wraps
from inspect import formatannotation, signature
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from autoglm_compress.errors import UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
MODULES = re.compile(r"\b(?:[a-z_]\w*\.)+")
"""The modules in front of a type's name."""


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, with every argument compared to its annotation first; nothing is converted.

    A text in `Annotated` says in messages what is expected, in place of the type. The function then raises UserError
    if an argument is of another type.
    """

    @cache  # annotations are resolved at the first call, which keeps the import quick
    def hints() -> dict[str, Any]:
        return get_type_hints(function, include_extras=True)

    @wraps(function)
    def checking(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for name, value in signature(function).bind(*args, **kwargs).arguments.items():
            _check(name, value, hints()[name])
        return function(*args, **kwargs)

    return checking


def _check(name: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        told = [text for text in getattr(hint, "__metadata__", ()) if isinstance(text, str)]
        expected = told[0] if told else MODULES.sub("", formatannotation(hint))
        raise UserError(f"{name}: given {value!r}: expected {expected}.") from None
