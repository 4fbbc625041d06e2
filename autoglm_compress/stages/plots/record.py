"""Parts of titles that several plots share."""

from autoglm_compress.figures import Record


def of_before(record: Record, size: str) -> str:
    """` of N` for a size before the stage, which the records of older versions do not hold."""
    return f" of {record['shape_before'][size]}" if "shape_before" in record else ""


def method_of(record: Record) -> str:
    """The name of the method. If the stage chose it, the decisions have it."""
    return (record["decisions"].get("method") or record["options"]["method"]).replace("_", " ")
