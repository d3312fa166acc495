"""Read instruction records: `{instruction, input?, output, image?}`. `adapter.records.files` has the files' formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.records.files import check_text, read_rows

_FIELDS = ("instruction", "input", "output", "image")


def read_records(path: str | Path, *, answered: bool = True, keep_rejected: bool = False) -> Iterator[dict[str, str]]:
    """Read and check the records of a `.json` (array), `.jsonl` or `.parquet` file, in order, in bounded memory.

    Yields records with the text fields instruction, input, output and image; a missing input or image is ''.
    answered: False for records that are still to be answered, which need no `output`; a missing one is ''.
    keep_rejected: yield a `rejected_record` for each record that cannot be used, instead of raising for the first.

    Raises RecordError, naming the file and the item, line or row, for a record that is malformed, or whose fields are
    missing or not text; and, whatever `keep_rejected`, for a file that `read_rows` refuses.
    """
    for place, row, error in read_rows(path):
        try:
            if error:
                raise RecordError(error)
            record = _checked(row, answered)
        except RecordError as error:
            if not keep_rejected:
                raise RecordError(f"{path}, {place}: {error}") from error
            record = rejected_record(place, str(error))
        yield record


def rejected_record(place: str, reason: str) -> dict[str, str]:
    """An empty record in place of one that cannot be used, with its `place` in the file, and the reason `rejected`."""
    return {**dict.fromkeys(_FIELDS, ""), "place": place, "rejected": reason}


def _checked(record: Any, answered: bool) -> dict[str, str]:
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object with 'instruction' and 'output', got {record!r:.60}")
    for name in ("instruction", "output") if answered else ("instruction",):
        if name not in record:
            hint = f"its keys are {list(record)!r:.200}"
            if "conversations" in record:
                hint = "it is a conversation, which the format llava reads"
            elif "messages" in record:
                hint = (
                    "chat 'messages' are not read; rewrite them as 'conversations' of 'from' and 'value', format llava"
                )
            raise RecordError(f"the record has no {name!r}; {hint}")
    fields = {name: record.get(name, "") for name in _FIELDS}
    if not answered and not isinstance(fields["output"], str):
        fields["output"] = ""  # it is not read, so it may be anything
    fields = {name: "" if value is None and name in ("input", "image") else value for name, value in fields.items()}
    return {name: check_text(value, repr(name)) for name, value in fields.items()}
