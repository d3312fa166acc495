"""The model that lm-evaluation-harness is handed: it turns texts into requests of token ids and has them computed.

Texts become tokens as in the harness's own backend for transformers, so that a base gets the same figures from both.
Those conventions are: strings of special tokens count as such; a text begins as the tokenizer begins texts, unless it
spells BOS itself; an empty context is BOS, or EOS of a tokenizer without one; what is too long loses its beginning.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from typing import Any

from adapter.records.chat_encoding import stop_ids
from adapter.templates import PromptTemplate, Template
from adapter.tokenizers.base import Tokenizer
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.batch import GenerationTask, Record
from rayjobs.inference.harness_requests import ContinuePrompts, ScoreContinuations, request_order

Compute = Callable[[str, GenerationTask, list[Record]], list[Record]]
"""(kind of request, task of a worker, records) → a row for each record."""

NEW_TOKENS = 256
"""Most new tokens of a task that does not say, as in the harness's own backends."""
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks")
"""The keys of a task's generation_kwargs that the engine follows."""


def harness_lm(tokenizer: Tokenizer, template: Template | None, window: int, compute: Compute, **settings: Any) -> Any:
    """The harness's `LM` of a model; the arguments are those of `HarnessModel`."""
    from lm_eval.api.model import TemplateLM

    # The harness's own method encodes contexts and continuations.
    methods = {"loglikelihood": partialmethod(TemplateLM.loglikelihood, disable_tqdm=True)}
    return type("AdapterLM", (HarnessModel, TemplateLM), methods)(tokenizer, template, window, compute, **settings)


class HarnessModel:
    """The methods of the harness's `TemplateLM`, which `harness_lm` joins it with, as the harness is optional."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        window: int,
        compute: Compute,
        *,
        token_budget: int = 8192,
        seed: int = 0,
    ) -> None:
        """template: of conversations, for the harness's option to ask in one. window: most tokens of the model's input.

        compute: has the requests computed. token_budget: tokens of a batch, padding included. seed: of sampling.
        """
        super().__init__()
        self.pieces, self.template, self.max_length = tokenizer, template, window
        self._compute, self._token_budget, self._seed = compute, token_budget, seed

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context: BOS, also where texts do not begin with it; else EOS."""
        ids = self.pieces.encode_rendered(self._bos_text).ids if self._bos_text else []
        bos = ids[0] if len(ids) == 1 else self.pieces.bos_id
        return self.pieces.eos_id if bos is None else bos

    @property
    def _bos_text(self) -> str:
        return self.pieces.special_tokens.get("bos_token", "")

    @property
    def tokenizer_name(self) -> str:
        """The identity of the tokenizer and its chat template."""
        return self.pieces.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. add_special_tokens: False for no BOS; None for none where the text spells it."""
        ids = self.pieces.encode_rendered(string).ids
        spelled = add_special_tokens is None and bool(self._bos_text) and string.startswith(self._bos_text)
        bos = None if spelled or add_special_tokens is False else self.pieces.bos_id
        return ids if bos is None else [bos, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> Any:
        """(log-likelihood, is greedy) of each (texts, context, continuation) of ids."""
        rows = self._score("loglikelihood", [request[1:] for request in requests])
        return [(row["log_likelihood"], row["greedy"]) for row in rows]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each request's text, in windows of which each token is predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = list[tuple[list[int], list[int]]](), list[int]()
        for number, request in enumerate(requests):
            (text,) = request.args
            ids, prefix = self.tok_encode(text), self.prefix_token_id
            found = get_rolling_token_windows(ids, prefix_token=prefix, max_seq_len=self.max_length, context_len=1)
            windows += list(map(make_disjoint_window, found))
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, row in zip(owners, self._score("loglikelihood_rolling", windows), strict=True):
            sums[owner] += row["log_likelihood"]
        return sums

    def _score(self, kind: str, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Record]:
        """The row of each (context, continuation). Raises DataError for a continuation that cannot be scored."""
        records = []
        for context, continuation in pairs:
            n = len(continuation)
            if not 0 < n <= self.max_length:
                after = self.pieces.decode(context)[-40:]
                raise DataError(f"a continuation after {after!r} has {n} tokens: it needs 1 to {self.max_length}")
            ids = [*context, *continuation][-(self.max_length + 1) :]
            records.append({"context": ids[:-n], "continuation": continuation})
        return self._rows(kind, ScoreContinuations(self._token_budget), records)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text that continues each request's context, up to its first stop string.

        Raises ConfigError for settings of generation that the engine does not have.
        """
        seen: Counter[str] = Counter()
        records = []
        for request in requests:
            context, given = request.args[:2]
            sampling = self._sampling(given)
            room = self.max_length - sampling["max_new_tokens"]
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks of a task is {sampling['max_new_tokens']}, which leaves no prompt in a window of "
                    f"{self.max_length} tokens: let the task ask for fewer"
                )
            prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            key = repr((prompt, sampling))
            records.append({"prompt": prompt, "repeat": seen[key], **sampling})
            seen[key] += 1
        ends = stop_ids(self.template, self.pieces)
        return [row["text"] for row in self._rows("generate_until", ContinuePrompts(ends), records)]

    def _sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's settings for a task's generation_kwargs."""
        from lm_eval.models.utils import normalize_gen_kwargs

        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        if unknown := sorted(set(kwargs) - set(SAMPLING)):
            raise ConfigError(
                f"generation_kwargs of a task has {', '.join(unknown)}: generation here follows {', '.join(SAMPLING)}"
            )
        return {
            "until": [stop for stop in kwargs["until"] if stop],
            "max_new_tokens": kwargs["max_gen_toks"],
            "temperature": float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0,
            "top_p": float(kwargs.get("top_p") or 1.0),
            "top_k": int(kwargs.get("top_k") or 0),
            "seed": self._seed,
        }

    def _rows(self, kind: str, task: GenerationTask, records: list[Record]) -> list[Record]:
        """The row of each record; they are computed in the order that is best for a model."""
        if not records:
            return []
        order = sorted(range(len(records)), key=lambda i: request_order(records[i]))
        rows = self._compute(kind, task, [records[i] for i in order])
        placed = dict(zip(order, rows, strict=True))
        return [placed[i] for i in range(len(records))]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template of conversations, as a text for the results."""
        if isinstance(self.template, PromptTemplate):
            return self.template.with_input
        return self.template.source if self.template else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. add_generation_prompt: False to end with the beginning of an answer.

        Raises RecordError for a conversation that the template refuses.
        """
        assert self.template is not None
        if isinstance(self.template, PromptTemplate):
            return _render_turns(self.template, chat_history, self.pieces.special_tokens.get("eos_token", ""))
        text = self.template.render(
            chat_history,
            special_tokens=self.pieces.special_tokens,
            add_generation_prompt=add_generation_prompt,
        ).text
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].lstrip()
        if begun not in text:  # the template takes the white space off its end
            begun = begun.rstrip()
        return text[: text.rindex(begun) + len(begun)]


def _render_turns(template: PromptTemplate, history: Sequence[Mapping[str, str]], end: str) -> str:
    """A conversation in a template of instructions, each answer but a last one with the text of the end token."""
    text, asked = "", False
    for number, message in enumerate(history, 1):
        content = message["content"]
        if message["role"] == "system":
            text += f"{content}\n\n"
        elif message["role"] == "user":
            text += template.render_later(content) if asked else template.render(content)
            asked = True
        else:
            text += content + (end if number < len(history) else "")
    return text
