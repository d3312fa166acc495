"""The base of a server with its adapters: what requests ask for becomes requests of the engine."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from adapter.engine.adapters import AdapterStore
from adapter.engine.engine import Engine
from adapter.engine.request import Request
from adapter.engine.worker import EngineWorker
from adapter.generation_config import GenerationConfig
from adapter.model import AdaptedModel
from adapter.records.chat_encoding import stop_ids
from adapter.records.encoding import encode_prompt
from adapter.templates import ALPACA, ChatTemplate, Template
from rayjobs.serve.adapter_folder import AdapterFolder, FoundAdapter
from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.bodies import ChatBody, CompletionBody, GenerationBody
from rayjobs.serve.settings import AdaptersConfig, EngineConfig, LimitsConfig

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a completion that asks for no number, as at OpenAI."""
MAX_TOKEN_CHARS = 128
"""Characters of a text, per token of the window, beyond which it is refused without being tokenized."""

ReadImage = Callable[[str], Tensor]
"""The text of a data URL → the features (F,) of its image."""


class Asked(NamedTuple):
    """The requests to the engine that one request to the server makes."""

    requests: list[Request]
    """One for each prompt."""
    texts: list[str | None]
    """The texts of the prompts; None of one that was given as ids."""


class TextModel:
    """A base, its adapters and its engine, which runs in a thread of its own until `close`."""

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str,
        adapters: AdaptersConfig | None = None,
        engine: EngineConfig | None = None,
        limits: LimitsConfig | None = None,
        read_image: ReadImage | None = None,
        encoder: str | None = None,
    ) -> None:
        """name: of the base in requests. read_image: for adapters that read images; None if none can be read. encoder:
        identity of the encoder that it uses."""
        adapters, engine, self.limits = adapters or AdaptersConfig(), engine or EngineConfig(), limits or LimitsConfig()
        self.name, self.tokenizer, self._read_image = name, model.tokenizer, read_image
        if engine.prepack:
            model.prepack_weights()
        identities = {"fingerprint": model.fingerprint, "tokenizer_sha256": model.tokenizer.sha256}
        store = AdapterStore(model.model, cache_bytes=adapters.cache_bytes, **identities)
        folder = None if adapters.folder is None else Path(adapters.folder)
        self.adapters = AdapterFolder(folder, store, model.model, encoder=encoder, taken=name, **identities)
        self.engine = Engine(
            model.model,
            model.tokenizer,
            adapters=store,
            slots=engine.slots,
            max_length=engine.max_length,
            prefill_tokens=engine.prefill_tokens,
            max_waiting=self.limits.waiting,
        )
        self.adapters.look()
        self.worker = EngineWorker(self.engine)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.engine.max_length

    @property
    def reads_images(self) -> bool:
        """There is an image encoder, for adapters that read images."""
        return self._read_image is not None

    def close(self) -> None:
        """Stop the engine; requests that have not ended fail."""
        self.worker.close()

    def find(self, name: str) -> FoundAdapter | None:
        """The adapter of a name; None for the base. It may look for a new one, and so read files.

        Raises ApiError for a name that is neither.
        """
        if name == self.name:
            return None
        if (found := self.adapters.find(name)) is None:
            why = self.adapters.why_not(name)
            message = f"the model {name!r:.80} is not served: {why or '/v1/models lists those that are'}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return found

    def ask_completion(self, body: CompletionBody) -> Asked:
        """The engine's requests of a completion. It tokenizes, and may read files. Raises ApiError or AdapterError."""
        adapter = None if self.find(body.model) is None else body.model
        self._check_choices(body, len(body.prompts))
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if wanted == 0 and not body.echo:
            raise ApiError("max_tokens is 0, which only an echo may ask for", param="max_tokens")
        requests: list[Request] = []
        texts: list[str | None] = []
        seen: dict[tuple[int, ...], int] = {}
        for prompt in body.prompts:
            ids = self._encode(prompt) if isinstance(prompt, str) else prompt
            texts.append(prompt if isinstance(prompt, str) else None)
            self._check_window(len(ids), wanted, "prompt")
            config = self._config(body, max(1, wanted))
            repeat = seen.get(tuple(ids), 0)
            seen[tuple(ids)] = repeat + (body.n or 1)
            requests.append(
                Request(
                    prompt=ids,
                    adapter=adapter,
                    config=config,
                    top_k=max(0, body.top_k or 0),
                    stop=body.stop_texts,
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if body.echo else None,
                    n=body.n or 1,
                    repeat=repeat,
                )
            )
        return Asked(requests, texts)

    def ask_chat(self, body: ChatBody) -> Asked:
        """The engine's request of a conversation. It tokenizes, encodes images, and may read files.

        Raises ApiError or AdapterError.
        """
        found = self.find(body.model)
        self._check_choices(body, 1)
        template = self._template(found)
        messages = [
            {"role": "system" if one.role == "developer" else one.role, "content": one.text} for one in body.messages
        ]
        if messages[-1]["role"] != "user":
            raise ApiError("the last message must be the user's", param="messages")
        if sum(len(one["content"]) for one in messages) > MAX_TOKEN_CHARS * self.max_length:
            raise self._too_long("messages")
        # A conversation that is too long is refused, as at OpenAI, and not shortened.
        ids = encode_prompt({"messages": messages}, self.tokenizer, template, window=2**31).ids
        wanted = body.max_completion_tokens or body.max_tokens
        self._check_window(len(ids), wanted or 1, "messages")
        room = self.max_length - len(ids)
        request = Request(
            prompt=ids,
            adapter=None if found is None else body.model,
            image=self._image(body, found),
            config=self._config(body, wanted or min(room, self.limits.tokens or room)),
            top_k=max(0, body.top_k or 0),
            stop_ids=stop_ids(template, self.tokenizer),
            stop=body.stop_texts,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            n=body.n or 1,
        )
        return Asked([request], [None])

    def _template(self, found: FoundAdapter | None) -> Template:
        """The template of an adapter's training; of the base, its own chat template; or Alpaca's."""
        if found is not None:
            return found.template or ALPACA
        own = self.tokenizer.chat_template
        return ALPACA if own is None else ChatTemplate(source=own)

    def _image(self, body: ChatBody, found: FoundAdapter | None) -> Tensor | None:
        urls = [url for message in body.messages for url in message.images]
        if not urls:
            return None
        if found is None or not found.reads_images:
            raise ApiError(f"the model {body.model!r:.80} reads no images: leave them out", param="messages")
        if self._read_image is None:
            raise ApiError("this server has no image encoder: it was started without vision", param="messages")
        if len(urls) > 1:
            raise ApiError(f"a conversation may hold one image, got {len(urls)}", param="messages")
        return self._read_image(urls[0])

    def _encode(self, text: str) -> list[int]:
        if len(text) > MAX_TOKEN_CHARS * self.max_length:
            raise self._too_long("prompt")
        return self.tokenizer.encode(text, bos=True, eos=False)

    def _config(self, body: GenerationBody, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
        )

    def _check_choices(self, body: GenerationBody, prompts: int) -> None:
        if not prompts:
            raise ApiError("prompt is an empty list", param="prompt")
        if prompts * (body.n or 1) > self.limits.choices:
            raise ApiError(
                f"{prompts} prompts x n={body.n or 1} are more than the {self.limits.choices} answers that one request "
                "may ask for: send several requests",
                param="n",
            )

    def _check_window(self, prompt: int, wanted: int, param: str) -> None:
        if self.limits.tokens is not None and wanted > self.limits.tokens:
            raise ApiError(
                f"{wanted} tokens are asked for, one answer may have {self.limits.tokens}", param="max_tokens"
            )
        if prompt + wanted > self.max_length:
            raise ApiError(
                f"the context holds {self.max_length} tokens; the {param} of {prompt} tokens with an answer of "
                f"{wanted} would need {prompt + wanted}: shorten one of them",
                param=param,
                code="context_length_exceeded",
            )

    def _too_long(self, param: str) -> ApiError:
        return ApiError(
            f"the {param} is far longer than the context of {self.max_length} tokens: shorten it",
            param=param,
            code="context_length_exceeded",
        )
