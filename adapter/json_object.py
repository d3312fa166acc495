"""Parse JSON, and read a file that holds one JSON object, as the settings of checkpoints and of tokenizers do."""

import json
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError
from adapter.file_kind import check_content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for what is malformed, is not UTF-8, or is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_object(file: Path, error: type[AdapterError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, naming the file, for JSON that is malformed or no object."""
    check_content(file, error)
    try:
        values = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as fault:  # malformed JSON and malformed UTF-8 are both ValueErrors
        raise error(f"{file}: not readable JSON ({fault})") from fault
    if not isinstance(values, dict):
        raise error(f"{file}: holds a {type(values).__name__}, not an object")
    return values
