"""Results with and without what they say of single questions and rows."""

from typing import Any

RECORDS = ("records", "rows")


def without_records(result: dict[str, Any]) -> dict[str, Any]:
    """Results by task, or a part of them, without the record of every question and the value of every row."""
    return {
        name: without_records(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name not in RECORDS
    }
