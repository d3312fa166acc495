"""Let a language model compare the answers of two runs of adapter-eval, task=answers, on the same records.

Each pair is asked in both orders; an answer wins if it is preferred in both, and everything else is a tie. The result
is the first run's win rate with a 95% interval. The same command resumes an interrupted run and keeps its verdicts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rayjobs.console import Progress, show_result, show_table
from rayjobs.errors import DataError
from rayjobs.inference.judging import (
    PROMPT,
    EndpointJudge,
    Pair,
    Verdict,
    check_prompt,
    judge_pairs,
    pair_answers,
    summarize_verdicts,
)
from rayjobs.inference.record_answers import ANSWERS_FILE
from rayjobs.job_configs.adapter_judge import Config
from rayjobs.lifecycle import job
from rayjobs.models.endpoint import endpoint_errors
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import read_jsonl, read_parquet, write_jsonl
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.storage.paths import resolve_path

VERDICTS, IDENTITY = "verdicts.jsonl", "judged.json"
"""Files of the run folder: the verdicts, and what they depend on."""
SAVE_EVERY = 10
"""Pairs after which the verdicts are written."""


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    pairs: list[Pair]
    prompt: str
    identity: dict[str, Any]
    """what verdicts depend on, by content"""


def check(settings: Config) -> Checked:
    """Check everything that can be checked before the judge is asked. Raises a UserError for the first problem."""
    pairs = pair_answers(read_answers(settings.first), read_answers(settings.second))[: settings.limit]
    prompt = read_prompt(settings.prompt) if settings.prompt else PROMPT
    settings.endpoint.open()
    asked = [settings.endpoint.identity(), settings.max_tokens]
    identity = {"pairs": fingerprint(pairs)[:16], "prompt": fingerprint(prompt)[:16], "judge": asked}
    check_provenance(settings.run.folder / IDENTITY, identity)
    return Checked(pairs, prompt, identity)


def read_prompt(path: str) -> str:
    """The judge's prompt of a file. Raises DataError for one that is no text in UTF-8, or lacks a field."""
    try:
        prompt = resolve_path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a prompt is a text in UTF-8: {error}") from error
    check_prompt(path, prompt)
    return prompt


def read_answers(folder: str) -> list[dict[str, Any]]:
    """The rows of a run's answers. Raises DataError if the folder has none."""
    path = resolve_path(folder) / ANSWERS_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder of a run of adapter-eval with task=answers")
    return read_parquet(path, ["record", "question", "reference", "answer"]).to_pylist()


def read_verdicts(settings: Config) -> list[Verdict]:
    """The verdicts that an earlier start of the run has written. Raises DataError for a file of something else."""
    path = settings.run.folder / VERDICTS
    rows = read_jsonl(path) if path.exists() else []
    try:
        return [Verdict(record=row["record"], outcome=row["outcome"], replies=tuple(row["replies"])) for row in rows]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a line is not a verdict ({error!r}): move the file away to ask anew") from error


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    pairs, done = check(settings).pairs, len(read_verdicts(settings))
    rows = [
        ["first", settings.first],
        ["second", settings.second],
        ["judge", f"{settings.endpoint.model} at {settings.endpoint.base_url or 'OpenAI'}"],
        ["pairs", f"{len(pairs):,}, of which {done:,} are judged"],
        ["requests", f"at most {2 * (len(pairs) - done):,}: a pair is asked in both orders, equal answers are not"],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Ask the judge; return and write `result.json`, with every verdict and reply in `verdicts.jsonl`."""
    checked = check(settings)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / IDENTITY, checked.identity)
    verdicts = read_verdicts(settings)
    left = checked.pairs[len(verdicts) :]
    judge = EndpointJudge(settings.endpoint.open(), max_tokens=settings.max_tokens)
    progress = Progress("judge", unit="pairs", total=len(checked.pairs), done=len(verdicts))
    try:
        with endpoint_errors(settings.endpoint), progress as bar:
            for verdict in judge_pairs(left, judge, checked.prompt):
                verdicts.append(verdict)
                bar.advance()
                if len(verdicts) % SAVE_EVERY == 0:
                    write_jsonl(folder / VERDICTS, map(asdict, verdicts))
    finally:
        write_jsonl(folder / VERDICTS, map(asdict, verdicts))
    result = summarize(settings, checked.pairs, verdicts)
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result


def summarize(settings: Config, pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The result: win rate, counts, and some pairs of each outcome."""
    result = summarize_verdicts(verdicts)
    rate, low, high = (100 * result[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
    first, second = (resolve_path(folder).name for folder in (settings.first, settings.second))
    shown = []
    for outcome in ("first", "second", "tie"):
        of_outcome = [pair for pair, one in zip(pairs, verdicts, strict=True) if one.outcome == outcome]
        shown += [
            {"preferred": outcome, "question": pair.question, "first": pair.first, "second": pair.second}
            for pair in of_outcome[:4]
        ]
    return {
        "headline": f"{first} wins {rate:.1f}% [{low:.1f}, {high:.1f}] against {second}, over {len(pairs):,} pairs",
        **result,
        "some_pairs": shown,
    }
