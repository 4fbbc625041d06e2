"""Text streamed by the `datasets` library, as rows of tokens."""

from autoglm_compress.calibration.dataset import Dataset, streamed
from autoglm_compress.calibration.python_docs import split_of_text
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.tokens import PackedRows
from autoglm_compress.calibration.training_rows import TextPart, deciding_rows, rows_to_fetch, set_apart
from autoglm_compress.errors import UserError


def dataset_rows(options: Dataset, reader: Reader, wanted: int, length: int) -> TextPart:
    """The first rows [rows, length] of a dataset, up to the number wanted, and rows that decide.

    Documents are split like those of calibration sources, so a text in both gets the same role in both. Only the needed
    part is fetched. If the dataset is too small for the split, some of its rows decide.

    Raises:
        UserError: the dataset, its split or its column is not there, or it does not fill a row.
    """
    most = deciding_rows(wanted, length, 1)
    parts = {"fitted": PackedRows(wanted, length), "deciding": PackedRows(most, length)}
    undivided = PackedRows(rows_to_fetch(wanted, length), length)
    for text in streamed(options, "data"):
        part = parts.get(split_of_text(text))
        can_be_divided = all(part.started for part in parts.values())
        if part is None or (can_be_divided and part.full):
            continue
        ids = reader.ids(text)
        part.add(ids)
        if not can_be_divided:
            undivided.add(ids)
        if all(part.full for part in parts.values()):
            break
    rows, deciding = (part.rows() for part in parts.values())
    if len(rows) and len(deciding):
        return TextPart(rows, wanted, deciding)
    found = undivided.rows()
    if len(found) == 0:
        raise UserError(
            f"data: {options.dataset}: not enough text for one row of sequence_length {length}: give more, or smaller "
            "rows. A tenth of the documents is left out, as held out to measure on."
        )
    return set_apart(found, wanted, most)
