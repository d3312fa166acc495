"""The examples of docs/data.md are records, each of the format under which it stands."""

import re
from pathlib import Path

from adapter.records.reader import read_records, recognise

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


def test_every_example_is_read(tmp_path: Path) -> None:
    examples = re.findall(r"```jsonl\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    formats = []
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(example, encoding="utf-8")
        assert len(list(read_records(path))) == 3
        formats += recognise(path)
    assert formats == ["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
