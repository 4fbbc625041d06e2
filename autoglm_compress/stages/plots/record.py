"""What several plots tell of a record in their titles."""

from autoglm_compress.figures import Record


def of_before(record: Record, size: str) -> str:
    """` of N` for a size before the stage, which the records of older versions do not hold."""
    return f" of {record['shape_before'][size]}" if "shape_before" in record else ""


def method_of(record: Record) -> str:
    """What a method is called; where a stage chose one, its decisions say which."""
    return (record["decisions"].get("method") or record["options"]["method"]).replace("_", " ")
