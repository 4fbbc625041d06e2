"""Tables on the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from autoglm_compress.report.numbers import plain, size

if TYPE_CHECKING:
    from autoglm_compress.serving.verifying import Check


def checks_table(checks: "Sequence[Check]") -> Table:
    """What a server answered, one check in each row."""
    table = _table("check", "result", "found")
    for check in checks:
        table.add_row(check.name, check.result.value, escape(check.detail))
    return table


def speeds_table(found: Mapping[str, Any]) -> Table:
    """What `benchmark` measured: medians, with the least and the most in brackets."""
    table = _table("", found["engine"])
    table.add_row("load", _spread(found["load_seconds"], lambda value: f"{plain(value, 3)} s"))
    table.add_row("peak memory", _spread(found["peak_rss_bytes"], size))
    for prompt in found["prompts"]:
        tokens = prompt["prompt_tokens"]
        first = _spread(prompt["first_token_seconds"], lambda value: f"{plain(1000 * value, 3)} ms")
        table.add_row(f"first token after {tokens}", first)
        table.add_row(f"tokens/s after {tokens}", _spread(prompt["tokens_per_second"], lambda value: plain(value, 3)))
    return table


def _spread(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    return f"{show(values['median'])} ({show(values['least'])} to {show(values['most'])})"


def _table(*headings: str) -> Table:
    return Table(*headings, box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
