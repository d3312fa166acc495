"""Compare the answers of two runs pair by pair, by the verdicts of a language model behind an endpoint.

A judge tends to favour the answer that it reads first (Zheng et al., 2023, arXiv 2306.05685). Each pair is therefore
asked in both orders: an answer wins if it is preferred in both, and everything else is a tie.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cafo.openai_client import Endpoint, RateLimitedClient
from cafo.wilson import wilson_interval
from rayjobs.errors import DataError

PROMPT = """Two assistants were given the same task. Decide which answer is better.

Judge whether an answer is correct, does what is asked, and says nothing that is false. Neither the length of the
answers nor their order counts. If neither is better, call it a tie.

[Task]
{question}

[Answer A]
{first}

[Answer B]
{second}

Give a short reason. Then end with one line that holds the verdict alone: [[A]], [[B]] or [[tie]]."""
"""The prompt of the judge."""

FIELDS = ("question", "reference", "first", "second")
"""The fields that a prompt may have; `question`, `first` and `second` it must have."""

_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)

Outcome = Literal["first", "second", "tie", "unreadable"]
"""The run whose answer won, or neither; or there is a reply without a verdict."""


class Pair(NamedTuple):
    """The answers of two runs to one question."""

    record: str
    """identity of the question"""
    question: str
    reference: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict on a pair of answers."""

    record: str
    outcome: Outcome
    replies: tuple[str, ...] = ()
    """with the first run's answer as A, then as B; none if both answers are equal, which is a tie without a question"""

    @property
    def preferred(self) -> tuple[str | None, ...]:
        """The label that each reply prefers: A, B or tie; None for a reply without a verdict."""
        return tuple(map(read_verdict, self.replies))


def check_prompt(path: str, prompt: str) -> None:
    """Raise DataError, naming the prompt's file, for a prompt that lacks a field."""
    if missing := [name for name in FIELDS if name != "reference" and f"{{{name}}}" not in prompt]:
        raise DataError(f"{path}: the prompt lacks {', '.join(f'{{{name}}}' for name in missing)}: add what is missing")


def pair_answers(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[Pair]:
    """The questions that both runs answered, in the order of the first.

    Args:
        first: rows {record, question, reference, answer} of a run; `answer` is None where there is none.
        second: those of the other.

    Raises:
        DataError: there is none.
    """
    others = {row["record"]: row["answer"] for row in second if row["answer"] is not None}
    own = {row["record"]: row for row in first if row["answer"] is not None and row["record"] in others}
    if not own:
        raise DataError("the two runs answered no question in common: give runs on the same records")
    return [
        Pair(record, row["question"], row["reference"], row["answer"], others[record]) for record, row in own.items()
    ]


def fill_prompt(prompt: str, pair: Pair, *, swapped: bool) -> str:
    """The prompt about a pair, with the first run's answer in the field `first`, or in `second` if swapped."""
    texts = pair._asdict()
    if swapped:
        texts["first"], texts["second"] = pair.second, pair.first
    # One pass: braces in the texts are no fields.
    return re.sub("|".join(f"{{{name}}}" for name in FIELDS), lambda field: texts[field.group()[1:-1]], prompt)


def read_verdict(reply: str) -> str | None:
    """The verdict of a reply, its last one: A, B or tie; None if it has none."""
    found = _VERDICT.findall(reply)
    return None if not found else "tie" if found[-1].lower() in ("c", "tie") else found[-1].upper()


def join_verdicts(as_first: str | None, as_second: str | None) -> Outcome:
    """The outcome of a pair, from the verdicts with the first run's answer as A and as B."""
    if as_first is None or as_second is None:
        return "unreadable"
    if (as_first, as_second) == ("A", "B"):
        return "first"
    return "second" if (as_first, as_second) == ("B", "A") else "tie"


def judge_pairs(pairs: Sequence[Pair], ask: Callable[[str], str], prompt: str) -> Iterator[Verdict]:
    """Yield the verdict of each pair. ask: sends a text to the judge and returns its reply."""
    for pair in pairs:
        if pair.first.strip() == pair.second.strip():
            yield Verdict(record=pair.record, outcome="tie")
            continue
        replies = tuple(ask(fill_prompt(prompt, pair, swapped=swapped)) for swapped in (False, True))
        as_first, as_second = map(read_verdict, replies)
        yield Verdict(record=pair.record, outcome=join_verdicts(as_first, as_second), replies=replies)


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint, *, max_tokens: int) -> None:
        """max_tokens: of a reply."""
        self._client, self._max_tokens = RateLimitedClient(endpoint), max_tokens

    def __call__(self, text: str) -> str:
        """The reply to a text, at temperature 0. Raises openai.OpenAIError if the endpoint refuses."""
        reply = self._client.acquire().chat.completions.create(
            model=self._client.endpoint.model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=self._max_tokens,
        )
        return reply.choices[0].message.content or ""


def summarize_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The first run's win rate with Wilson's 95% interval over pairs, a tie counting as half a win, and the counts.

    Pairs with an unreadable verdict count for nothing but their own number. `same_in_both_orders` is the share of
    asked pairs whose two verdicts agree, and `first_place_preferred` the share, among the verdicts that prefer an
    answer, of those for the one that was shown first. Raises DataError if no pair has readable verdicts.
    """
    readable = [verdict for verdict in verdicts if verdict.outcome != "unreadable"]
    if not readable:
        raise DataError(
            f"no reply to {len(verdicts):,} pairs has a verdict such as [[A]]: give the judge more max_tokens, another "
            "prompt, or take another model"
        )
    counts = {name: sum(one.outcome == name for one in verdicts) for name in ("first", "tie", "second", "unreadable")}
    rate = (counts["first"] + counts["tie"] / 2) / len(readable)
    low, high = wilson_interval(rate, len(readable))
    asked = [verdict.preferred for verdict in readable if verdict.replies]
    swap = {"A": "B", "B": "A", "tie": "tie"}
    labels = [label for pair in asked for label in pair if label != "tie"]
    return {
        "win_rate": round(rate, 4),
        "win_rate_low": round(low, 4),
        "win_rate_high": round(high, 4),
        "wins": counts["first"],
        "ties": counts["tie"],
        "losses": counts["second"],
        "equal_answers": sum(not verdict.replies for verdict in verdicts),
        "unreadable": counts["unreadable"],
        "same_in_both_orders": _share([swap[str(a)] == b for a, b in asked]),
        "first_place_preferred": _share([label == "A" for label in labels]),
    }


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None
