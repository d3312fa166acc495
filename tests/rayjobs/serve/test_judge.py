"""A served model judges pairs: its replies are what the model says."""

from pathlib import Path

from adapter import AdaptedModel
from cafo.openai_client import Endpoint
from rayjobs.inference.judging import EndpointJudge, Pair, fill_prompt, judge_pairs, read_verdict

PROMPT = "{question} [[A]] {first} [[B]] {second}"


def test_a_served_model_is_asked_in_both_orders(url: str, tiny_base: Path) -> None:
    pairs = [Pair("1", "the cat", "", "the big", "seven house on"), Pair("2", "the dog", "", "ran", "ran ")]
    endpoint = Endpoint(model="tiny", base_url=f"{url}/v1", key_variable="", requests_per_minute=60_000, retries=0)
    asked, equal = judge_pairs(pairs, EndpointJudge(endpoint, max_tokens=7), PROMPT)
    model = AdaptedModel.from_pretrained(tiny_base)
    texts = [fill_prompt(PROMPT, pairs[0], swapped=swapped) for swapped in (False, True)]
    said = [model.chat([{"role": "user", "content": text}], max_new_tokens=7, temperature=0) for text in texts]
    assert [reply.strip() for reply in asked.replies] == said
    assert len(asked.replies) == 2
    assert asked.preferred == tuple(map(read_verdict, said))
    assert (equal.outcome, equal.replies) == ("tie", ())
