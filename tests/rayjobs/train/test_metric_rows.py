"""No row of metrics is lost with a report that nobody collected."""

import json

from rayjobs.train.metric_rows import MetricRows


def metrics(reports: list[list[dict[str, int]]]) -> list[int]:
    """The steps of `metrics.jsonl` after these reports: rows of a step that comes again replace the earlier ones."""
    kept: list[int] = []
    for rows in reports:
        steps = [row["step"] for row in rows]
        kept = [step for step in kept if step < steps[0]] + steps
    return kept


def test_whatever_report_is_lost_before_a_checkpoint_its_rows_come_again() -> None:
    """Steps of which some report, every 4th with a checkpoint; the last report is never collected."""
    rows, collected, pending = MetricRows(), [], None
    checkpoints: list[tuple[int, list[dict[str, int]]]] = []
    for step in range(1, 18):
        rows.add({"step": step})
        if step % 4 == 0 or step in (3, 11, 15):
            if step % 4 == 0:
                checkpoints.append((step, json.loads(json.dumps(rows.for_checkpoint(step)))))
            if pending:
                collected.append(pending)
            pending = rows.unreported
            rows.forget_reported()
        if checkpoints:
            at, again = checkpoints[-1]
            resumed = MetricRows()
            resumed.resume(again, at)
            assert metrics([*collected, resumed.unreported]) == list(range(1, at + 1))


def test_a_checkpoint_repeats_no_more_than_two_intervals() -> None:
    rows = MetricRows()
    repeated = []
    for step in range(1, 41):
        rows.add({"step": step})
        if step % 10 == 0:
            repeated = rows.for_checkpoint(step)
            rows.forget_reported()
    assert [row["step"] for row in repeated] == list(range(21, 41))
    assert rows.unreported == []
