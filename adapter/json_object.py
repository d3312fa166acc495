"""Read a file that holds one JSON object, as the settings of checkpoints and of tokenizers do."""

import json
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError
from adapter.file_kind import check_content


def read_object(file: Path, error: type[AdapterError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, naming the file, for JSON that is malformed or no object."""
    check_content(file, error)
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as fault:  # malformed JSON and malformed UTF-8 are both ValueErrors
        raise error(f"{file}: not readable JSON ({fault})") from fault
    if not isinstance(values, dict):
        raise error(f"{file}: holds a {type(values).__name__}, not an object")
    return values
