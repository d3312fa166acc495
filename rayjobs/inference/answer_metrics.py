"""Compare answers with references: exact match, ROUGE-L and chrF, each with its 95% interval.

ROUGE-L (Lin, 2004) is the F-measure of the longest common subsequence of words, by the package `rouge-score`, which
reads lower-case Latin letters and digits and nothing else. chrF (Popović, 2015) is the F-measure of character n-grams,
by `sacrebleu`, and reads any script. All are in percent.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cafo.wilson import Z95, wilson_interval
from rayjobs.errors import ConfigError
from rayjobs.reporting.tables import supported_decimals

METRICS = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "chrf": "chrF"}
"""Columns of scores, and the names of their metrics."""


class AnswerScorer:
    """The metrics of single answers and of all."""

    def __init__(self) -> None:
        """Raises ConfigError if the packages that compute the metrics are not installed."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import CHRF
        except ImportError as error:
            raise ConfigError(f"task=answers needs two packages: pip install 'rayjobs[metrics]' ({error})") from error
        self._rouge, self._chrf = RougeScorer(["rougeL"]), CHRF()

    def score(self, answer: str, reference: str) -> dict[str, float]:
        """The scores of one answer, in percent. White space around both counts for nothing."""
        answer, reference = answer.strip(), reference.strip()
        return {
            "exact_match": 100.0 * (answer == reference),
            "rouge_l": 100 * self._rouge.score(reference, answer)["rougeL"].fmeasure,
            "chrf": self._chrf.sentence_score(answer, [reference]).score,
        }

    def corpus_chrf(self, answers: Sequence[str], references: Sequence[str]) -> float:
        """chrF over the n-grams of all answers, as it is usually published."""
        stripped = [[text.strip() for text in texts] for texts in (answers, references)]
        return self._chrf.corpus_score(stripped[0], [stripped[1]]).score

    @property
    def chrf_signature(self) -> str:
        """The settings and the version of chrF, as its authors ask for them beside figures."""
        return str(self._chrf.get_signature())


def metric_rows(scores: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    """A row for each metric: its mean over answers, in percent, and its 95% interval, of what other answers may give.

    The interval is Wilson's for exact match, and the normal one for the others. scores: of at least one answer.
    """
    rows = []
    for name, title in METRICS.items():
        values = [score[name] for score in scores]
        mean = statistics.mean(values)
        if name == "exact_match":
            low, high = (100 * bound for bound in wilson_interval(mean / 100, len(values)))
        else:
            half = Z95 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            low, high = max(0.0, mean - half), min(100.0, mean + half)
        decimals = supported_decimals((high - low) / 2, 2)
        interval = f"[{low:.{decimals}f}, {high:.{decimals}f}]" if len(values) > 1 else ""
        rows.append({"metric": title, "mean, %": f"{mean:.{decimals}f}", "95% interval": interval})
    return rows


def describe_metrics(rows: Sequence[Mapping[str, str]]) -> str:
    """The means in a line, such as `exact match 31 [24, 39], ROUGE-L 52.1 [48.0, 56.2], chrF …`."""
    return ", ".join(f"{row['metric']} {row['mean, %']} {row['95% interval']}".strip() for row in rows)


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of each metric, in percent, for other programs."""
    return {name: round(statistics.mean(score[name] for score in scores), 4) for name in METRICS}
