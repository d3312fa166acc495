"""What results were made from is compared key by key; what a version adds counts as its default."""

import json
from pathlib import Path

import pytest
from pydantic import Field

from rayjobs.config import config
from rayjobs.errors import ProvenanceError
from rayjobs.runs.provenance import check_provenance, find_changes, lock_provenance


@config
class Encoder:
    kind: str
    precision: str = "fp32"


@config
class Settings:
    encoders: dict[str, Encoder]
    shots: list[int] = Field(default=[1, 2])
    encoder: Encoder | None = None
    options: dict[str, float] | None = None


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"shots": [1, 2]}, {"shots": [1, 3]}, ["shots[1] was 2, now 3"]),
        ({"shots": [1]}, {"shots": [1, 3]}, ["shots was [1], now [1, 3]"]),
        ({"shots": [1, 2]}, {"shots": (1, 2)}, []),
        ({}, {"shots": [1, 2], "encoder": None, "options": None}, []),
        ({}, {"options": {"a": 1.0}}, ["options was None, now {'a': 1.0}"]),
        ({"encoder": None}, {"encoder": {"kind": "clip"}}, ["encoder was None, now {'kind': 'clip'}"]),
        ({"encoders": {"a": {"kind": "clip"}}}, {"encoders": {"a": {"kind": "clip", "precision": "fp32"}}}, []),
        (
            {"encoders": {"a": {"kind": "clip"}}},
            {"encoders": {"a": {"kind": "clip", "precision": "bf16"}}},
            ["encoders.a.precision was fp32, now bf16"],
        ),
        ({"encoders": {}}, {"encoders": {"a": {}}}, ["encoders.a was not recorded, now {}"]),
        ({"tower": "clip"}, {}, ["tower was clip, unknown to this version"]),
        ({"shots": ["x" * 99]}, {"shots": ["y"]}, [f"shots[0] was {'x' * 60}…, now y"]),
    ],
)
def test_differences_are_named_down_to_single_keys(before: dict, now: dict, told: list[str]) -> None:
    assert [str(change) for change in find_changes(before, json.loads(json.dumps(now)), Settings)] == told


def test_a_locked_identity_refuses_another_and_takes_its_own(tmp_path: Path) -> None:
    path = tmp_path / "r" / "settings.json"
    lock_provenance(path, {"shots": [1], "url": "http://user:secret@host"}, kind=Settings)
    assert "secret" not in path.read_text()
    lock_provenance(path, {"shots": [1], "url": "http://user:other@host", "encoder": None}, kind=Settings)
    with pytest.raises(ProvenanceError, match=r"r holds results of other settings \(shots\[0\] was 1, now 2\): a hint"):
        check_provenance(path, {**json.loads(path.read_text()), "shots": [2]}, hint="a hint", kind=Settings)
