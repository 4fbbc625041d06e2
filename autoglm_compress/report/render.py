"""Rendering templates, with all content of files escaped, and writing pages."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from autoglm_compress.errors import UserError


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("autoglm_compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **context: Any) -> str:
    """A page from its template."""
    return _environment().get_template(template).render(**context)


def write_page(page: str, output: Path) -> None:
    """Write a page, so that it is there whole or not at all.

    Raises:
        UserError: it cannot be written there.
    """
    temporary = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(output)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{output}: cannot write there: {reason}. Give a file with --output.") from None
