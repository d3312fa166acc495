"""The rows of metrics that a worker has logged: those to report next, and those that a checkpoint repeats."""

from typing import Any


class MetricRows:
    """Rows on their way from a worker to the run's `metrics.jsonl`.

    A report can be lost with the workers, or with the driver, after a later checkpoint has reached the storage: Ray
    Train's controller collects reports after they were made, one at a time. A run that resumed from that checkpoint
    would lack the rows. A checkpoint therefore repeats the rows since the last checkpoint but one, before which the
    controller had collected every report; they replace those of the same steps.
    """

    def __init__(self) -> None:
        self.unreported: list[dict[str, Any]] = []
        self._recent: list[dict[str, Any]] = []
        self._last_checkpoint = 0

    def add(self, row: dict[str, Any]) -> None:
        """Log a row, which has its `step`."""
        self.unreported.append(row)
        self._recent.append(row)

    def forget_reported(self) -> None:
        """Forget the rows that a report has taken."""
        self.unreported = []

    def for_checkpoint(self, step: int) -> list[dict[str, Any]]:
        """Return the rows that a checkpoint of this step repeats."""
        rows = self._recent
        self._recent = [row for row in rows if row["step"] > self._last_checkpoint]
        self._last_checkpoint = step
        return rows

    def resume(self, rows: list[dict[str, Any]], step: int) -> None:
        """Go on after a checkpoint of this step: its rows are reported again."""
        self.unreported, self._recent, self._last_checkpoint = list(rows), list(rows), step
