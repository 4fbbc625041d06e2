"""Tables of the page: cells for people, and the same as CSV and JSON for machines."""

import base64
import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A value and how it reads; `stderr` is its standard error, `tint` from -1 to 1 colours the cell, worst to best."""

    value: str | float | None = None
    text: str = ""
    stderr: float | None = None
    stderr_text: str = ""
    tint: float | None = None

    @property
    def sort_key(self) -> str:
        """What the column is sorted by; empty goes last."""
        return "" if self.value is None else str(self.value)


@dataclass(frozen=True)
class Column:
    """A column: its name in files, its heading, and a sentence that explains it."""

    key: str
    heading: str
    about: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its files and its anchor."""

    name: str
    columns: list[Column]
    rows: list[list[Cell]]
    about: str = ""

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain data. Numbers that JSON cannot represent become None."""
        with_error = {number for row in self.rows for number, cell in enumerate(row) if cell.stderr is not None}
        found = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for number, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                record[column.key] = _finite(cell.value)
                if number in with_error:
                    record[f"{column.key}_stderr"] = _finite(cell.stderr)
            found.append(record)
        return found

    def csv_link(self) -> str:
        """The table as a CSV file within a link."""
        stream = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(stream, list(records[0]) if records else [column.key for column in self.columns])
        writer.writeheader()
        writer.writerows(records)
        return data_link("text/csv", stream.getvalue())

    def json_link(self) -> str:
        """The table as a JSON file within a link."""
        return json_link(self.records())


def json_link(data: Any) -> str:
    """Data as a JSON file within a link."""
    return data_link("application/json", json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def data_link(kind: str, content: str) -> str:
    """A file within a link."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(content.encode()).decode()}"


def text_cell(text: object) -> Cell:
    """Words; None is an empty cell."""
    return Cell() if text is None else Cell(str(text), str(text))


def number_cell(value: float | None, show: Callable[[float], str], **more: Any) -> Cell:
    """A number, shown by a function; None is an empty cell."""
    return Cell() if value is None else Cell(value, show(value), **more)


def without_empty_columns(table: Table) -> Table:
    """The table without the columns that no row has a value for."""
    kept = [number for number in range(len(table.columns)) if any(row[number].value is not None for row in table.rows)]
    rows = [[row[number] for number in kept] for row in table.rows]
    return Table(table.name, [table.columns[number] for number in kept], rows, table.about)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
