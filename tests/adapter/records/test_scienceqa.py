"""ScienceQA: the original layout as it is, answers out of free text, and a table whose numbers are known by hand."""

import json

import pytest

from adapter.errors import RecordError
from adapter.records.scienceqa import (
    CLASSES,
    LETTERS,
    PUBLISHED,
    TEMPLATE,
    Problem,
    read_answer,
    read_problems,
    tabulate,
)


def problem(**changes) -> Problem:
    fields = {
        "pid": "1",
        "question": "Which is red?",
        "choices": ("rose", "leaf"),
        "answer": 0,
        "hint": "",
        "image": "",
    }
    return Problem(**{**fields, "subject": "natural science", "grade": 2, **changes})


def write(folder, problems, splits=None):
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits or {"test": list(problems)}))
    return folder


RAW = {
    "question": "Which is red?", "choices": ["rose", "leaf", "sky"], "answer": 2, "hint": None, "image": None,
    "subject": "social science", "grade": "grade7", "split": "val", "lecture": "long", "task": "closed choice",
}  # fmt: skip


def test_the_prompt_is_question_context_and_options():
    record = problem(choices=("rose", "leaf", "sky", "sea", "soil"), hint="Look.", image="images/test/1/i.png").record()
    assert TEMPLATE.render(record["instruction"], record["input"]) == (
        "Question: Which is red?\nContext: Look.\nOptions: (A) rose (B) leaf (C) sky (D) sea (E) soil\nAnswer:"
    )
    assert (record["output"], record["image"]) == ("The answer is (A).", "images/test/1/i.png")
    assert problem().record(1)["output"] == "The answer is (B)."
    assert "Context" not in problem().record()["input"]


def test_the_original_layout_is_read(tmp_path):
    folder = write(tmp_path, {"7": RAW, "3": {**RAW, "image": "image.png", "grade": "grade12"}}, {"minival": [3, "7"]})
    first, second = read_problems(folder, "minival")
    assert (first.pid, second.pid) == ("3", "7")
    (blank,) = read_problems(write(tmp_path, {"7": {**RAW, "hint": " \n"}}), "test")
    assert (blank.hint, blank.classes) == ("", ("SOC", "NO", "G7-12"))
    assert first.image == "images/val/3/image.png", "a mini split's images lie under the whole one's"
    assert first.classes == ("SOC", "IMG", "G7-12")
    assert second.classes == ("SOC", "NO", "G7-12")
    assert problem(hint="h", image="i", grade=6).classes == ("NAT", "TXT", "IMG", "G1-6")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "problem 7: 'answer' must be a choice's index, 0 to 2, got 3"),
        ({"answer": True}, "'answer' must be"),
        ({"choices": ["one"]}, "'choices' must be a list of 2 to 26"),
        ({"question": None}, "'question' must be text"),
        ({"subject": "art"}, "'subject' must be one of natural science"),
        ({"hint": 7}, "'hint' must be text or null, got 7"),
        ({"image": {"bytes": "x"}}, "'image' must be text or null, got {'bytes'"),
        ({"grade": "7"}, "'grade' must be grade1 to grade12, got '7'"),
    ],
)
def test_a_malformed_problem_is_named(tmp_path, change, message):
    with pytest.raises(RecordError, match=message):
        read_problems(write(tmp_path, {"7": {**RAW, **change}}), "test")


def test_missing_files_splits_and_problems_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"problems\.json: no such file"):
        read_problems(tmp_path, "test")
    write(tmp_path, {"7": RAW}, {"test": ["8"]})
    with pytest.raises(RecordError, match="no split 'train'; it has test"):
        read_problems(tmp_path, "train")
    with pytest.raises(RecordError, match=r"problems\.json: no such file; ScienceQA is a folder"):
        read_problems(tmp_path / "problems.json", "train")
    write(tmp_path, {"7": RAW}, {"test": ["8"], "val": None})
    with pytest.raises(RecordError, match="'val' must be a list, got None"):
        read_problems(tmp_path, "val")
    with pytest.raises(RecordError, match="no problem 8"):
        read_problems(tmp_path, "test")


CHOICES = ("red", "dark red", "a sky", "14")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("The answer is (B).", 1),
        ("The answer is ( c ).", 2),
        (" the ANSWER IS: (D)", 3),
        ("The answer is B.", 1),
        ("Answer: C", 2),
        ("The answer is (A). The answer is (B).", 0),
        ("(A) is wrong and (B) is dark. The answer is (D)", 3),
        ("B", 1),
        ("B. dark red", 1),
        ("It must be (C), of course", 2),
        ("It is (C) or (D)", None),
        ("The answer is (E).", None),
        ("the colour is dark red", 1),
        ("The answer is red", 0),
        ("The answer is a sky", 2),
        ("The answer is a sea", None),
        ("A man", None),
        ("Red or a sky", None),
        ("144", None),
        ("", None),
        ("I do not know.", None),
        ("The correct answer is B because it is dark", 1),
        ("option B", 1),
        ("It must be option (b)", 1),
        ("**B**", 1),
        ("[B]", 1),
        ("(b)", 1),
        ("B, dark red", 1),
        ("Answer: A man", None),
        ("The answer is (A) or (B).", None),
        ("The answer is A, B and C", None),
        ("A, B and C", None),
        ("B or C", None),
        ("(A) is wrong, (B) is dark", None),
        ("animal(s)", None),
        ("It is not (A).", None),
        ("It isn't option A", None),
        ("It is not (A) but (B).", 1),
        ("Neither (A) nor (B).", None),
        ("The answer is not red", None),
        ("It cannot be red, it is a sky", 2),
        ("1.14", None),
        ("14.5", None),
        ("-14", None),
        ("14.", 3),
    ],
)
def test_answers_are_read_out_of_free_text(text, place):
    assert read_answer(text, CHOICES) == place


def test_choices_that_differ_in_capitals_are_told_apart_by_them():
    choices = ("Dear Pablo,", "dear Pablo,", "See you,\nZoe")
    assert [read_answer(said, choices) for said in ("dear Pablo,", "It is Dear Pablo, I think", "see you, zoe")] == [
        1, 0, 2
    ]  # fmt: skip
    assert read_answer("DEAR PABLO,", choices) is None
    assert read_answer("2.5 m", ("5 m", "10 m")) is None
    assert read_answer("2.5 m", ("5 m", "2.5 m")) == 1


def test_the_table_against_counts_by_hand():
    problems = [
        problem(answer=0, hint="h"),
        problem(answer=1, image="i", choices=("a", "b", "c", "d"), subject="social science"),
        problem(answer=1, hint="h", image="i", grade=9),
        problem(answer=1, grade=12),
    ]
    counts, rows = tabulate("ours", problems, [0, 1, None, 0])
    assert counts == {
        "NAT": 3, "SOC": 1, "LAN": 0, "TXT": 2, "IMG": 2, "NO": 1, "G1-6": 2, "G7-12": 2, "average": 4,
    }  # fmt: skip
    ours, majority, chance, *published = rows
    assert (ours.name, majority.name, chance.name) == ("ours", "always (B)", "random")
    assert ours.accuracy == {
        "NAT": pytest.approx(100 / 3), "SOC": 100, "TXT": 50, "IMG": 50, "NO": 0, "G1-6": 100, "G7-12": 0,
        "average": 50,
    }  # fmt: skip
    assert majority.accuracy["average"] == 75
    assert (chance.accuracy["SOC"], chance.accuracy["average"]) == (25, pytest.approx(100 * 1.75 / 4))
    assert [row.name for row in published] == list(PUBLISHED)
    with pytest.raises(ValueError, match="no problem"):
        tabulate("ours", [], [])


def test_a_whole_split_by_hand_written_counts(scienceqa):
    problems = read_problems(scienceqa, "test")
    counts, _ = tabulate("blind", problems, [None] * len(problems))
    assert counts == {
        "NAT": 20, "SOC": 20, "LAN": 20, "TXT": 40, "IMG": 24, "NO": 12, "G1-6": 30, "G7-12": 30, "average": 60,
    }  # fmt: skip
    assert all((scienceqa / problem.image).is_file() for problem in problems if problem.image)
    assert set(PUBLISHED["LLaMA-Adapter 7B (1.8 M), published"]) == {*CLASSES, "average"}
    for one in problems:
        assert read_answer(one.record()["output"], one.choices) == one.answer
        for place, choice in enumerate(one.choices):
            for said in (
                choice,
                f"The answer is {choice}",
                f"({LETTERS[place]}) {choice}",
                f"{LETTERS[place]}. {choice}",
            ):
                assert read_answer(said, one.choices) == place, (said, one.choices)
