"""Continuous batching: many requests, each with its own adapter and settings, share the steps of one frozen decoder.

    engine = Engine(model, tokenizer, adapters=AdapterStore(model))
    handle = engine.submit(Request(prompt=ids, adapter="french"))
    engine.run()                                    # or engine.step(), again and again, from one thread
    handle.choices[0].text

A sequence enters a free slot as soon as there is one, and leaves it when it ends; no other waits for it. Each step runs
the next token of every sequence that is being continued, and parts of waiting prompts, at most `prefill_tokens` of
them, so that a long prompt does not stop the others for long.

The slots that are in use are always the first ones: the sequences that are being continued, then at most one whose
prompt has been read in part.
"""

import threading
from collections import deque
from collections.abc import Sequence as Many

import torch

from adapter.decoder import Decoder
from adapter.engine.adapters import AdapterStore
from adapter.engine.request import Handle, OnEvent, QueueFullError, Request
from adapter.engine.row_parts import Owner, PartRows
from adapter.engine.row_prompts import PromptRows
from adapter.engine.sampling import TokenLogprob, choose, log_probabilities
from adapter.engine.sequence import Sequence
from adapter.errors import AdapterError
from adapter.kv_cache import Chunk, KVCache, Step
from adapter.tokenizers.base import Tokenizer


class Engine:
    """A frozen decoder that continues many prompts at a time.

    `submit` and `Handle.cancel` may be called from any thread; `step` and `run` from one at a time.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        adapters: AdapterStore | None = None,
        slots: int = 16,
        max_length: int | None = None,
        prefill_tokens: int = 256,
        max_waiting: int = 1024,
    ) -> None:
        """model: requests that name no adapter get it as it is, with the adapter that it holds, if any.

        tokenizer: for texts; None leaves them empty. slots: sequences that are continued together. max_length: tokens
        of a prompt with its continuation, the model's window if None; memory for slots x max_length tokens is allocated
        at once. prefill_tokens: tokens of prompts in one step. max_waiting: sequences that may wait for a slot.
        """
        window, weight = model.config.max_seq_len, model.tok_embeddings.weight
        if slots < 1 or prefill_tokens < 1 or not 1 <= (max_length or window) <= window:
            raise AdapterError(
                f"an engine needs slots >= 1, prefill_tokens >= 1 and max_length of 1 to {window}, the model's window; "
                f"got {slots}, {prefill_tokens} and {max_length}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.adapters = adapters or AdapterStore(model)
        self.slots, self.max_length, self.prefill_tokens = slots, max_length or window, prefill_tokens
        self.max_waiting = max_waiting
        self._cache = KVCache(model.config, slots, self.max_length, weight.dtype, weight.device)
        self._prompts = PromptRows(model.config, slots, weight.dtype, weight.device)
        self._parts = PartRows(model)
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []  # by slot
        self._lock = threading.Lock()  # of the queue

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Sequences that have a slot."""
        return len(self._active)

    @property
    def busy(self) -> bool:
        """There is something to do."""
        return bool(self._active or self._waiting)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Handle:
        """Queue a request. on_event: called with every `Event` of it, by the thread that runs the engine.

        Raises AdapterError for a prompt that is empty, longer than `max_length`, or holds an id outside the vocabulary,
        and for stop strings without a tokenizer; UnknownAdapterError for an adapter that is not registered;
        QueueFullError if too many sequences wait. What is wrong with an adapter's file, or with an image, is found when
        the request gets a slot: it then ends with "error", and `Handle.error` says why.
        """
        check_prompt(request.prompt, self.max_length, self.model.config.vocab_size)
        self.adapters.check(request.adapter)
        if self.tokenizer is None and (request.stop or request.stop_ids is None):
            raise AdapterError("an engine without a tokenizer needs stop_ids, and finds no stop strings")
        handle = Handle(request, on_event)
        sequences = self._sequences(handle)
        if sequences[0].limit < 1:
            for sequence in sequences:
                sequence.end("length")
            return handle
        with self._lock:
            if len(self._waiting) + len(sequences) > self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} sequences wait already, at most {self.max_waiting} may: ask again later"
                )
            self._waiting.extend(sequences)
        return handle

    def _sequences(self, handle: Handle) -> list[Sequence]:
        request = handle.request
        config, stop_ids = request.config, request.stop_ids
        if stop_ids is None:
            assert self.tokenizer is not None
            stop_ids = self.tokenizer.eos_ids
        seed = config.seed if config.seed is not None else int(torch.randint(2**62, ()))
        limit = min(config.max_new_tokens, self.max_length - len(request.prompt))
        return [
            Sequence(handle, choice, tokenizer=self.tokenizer, stop_ids=frozenset(stop_ids), seed=seed, limit=limit)
            for choice in range(request.n)
        ]

    def run(self) -> None:
        """Step until every request has ended."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Continue every active sequence by one token, and read on in waiting prompts."""
        self._drop_cancelled()
        lengths = [sequence.held for sequence in self._active if not sequence.unread]
        tokens = [sequence.last for sequence in self._active if not sequence.unread]
        chunks = self._next_chunks()
        for chunk in chunks:
            tokens += self._active[chunk.slot].prompt[chunk.start : chunk.stop]
        if not tokens:
            return
        step = Step(self._cache, self._prompts, lengths, chunks)
        ids = torch.tensor([tokens], device=self._cache.tensor.device)
        owners: list[Owner] = [(sequence.parts, 1) for sequence in self._active[: len(lengths)]]
        owners += [(self._active[chunk.slot].parts, chunk.stop - chunk.start) for chunk in chunks]
        with self._parts.installed(owners):
            hidden = self.model.hidden_states(ids, step)[0]  # (N, C)
        for sequence in self._active[: len(lengths)]:
            sequence.held += 1
        for chunk in chunks:
            self._active[chunk.slot].held = chunk.stop
        self._read_prompt_logprobs(hidden, len(lengths), chunks)
        self._choose(hidden, len(lengths), chunks)
        self._compact()

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, as after one that no request is to blame for."""
        with self._lock:
            sequences, self._active = [*self._active, *self._waiting], []
            self._waiting.clear()
        for sequence in sequences:
            sequence.handle.error = error
            sequence.end("error")

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [sequence for sequence in self._waiting if sequence.handle.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in [*gone, *(one for one in self._active if one.handle.cancelled)]:
            sequence.end("cancelled")
        self._compact()

    def _next_chunks(self) -> list[Chunk]:
        """The parts of prompts that the next step reads; sequences that begin get the next free slots."""
        chunks: list[Chunk] = []
        room = self.prefill_tokens
        if self._active and self._active[-1].unread:  # goes on where the last step stopped
            chunks.append(self._chunk(len(self._active) - 1, room))
            room -= chunks[0].stop - chunks[0].start
        while room and len(self._active) < self.slots and (sequence := self._next_waiting()) is not None:
            slot = len(self._active)
            request = sequence.handle.request
            try:
                adapter = self.adapters.get(request.adapter, request.image)
            except (AdapterError, OSError) as error:  # of this request alone
                sequence.handle.error = error
                sequence.end("error")
                continue
            self._prompts.put(slot, adapter.prompts)
            sequence.parts = adapter.parts
            self._active.append(sequence)
            chunks.append(self._chunk(slot, room))
            room -= chunks[-1].stop - chunks[-1].start
        return chunks

    def _chunk(self, slot: int, room: int) -> Chunk:
        sequence = self._active[slot]
        length = len(sequence.prompt)
        return Chunk(slot, sequence.held, min(length, sequence.held + room), length)

    def _next_waiting(self) -> Sequence | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _read_prompt_logprobs(self, hidden: torch.Tensor, n_continued: int, chunks: Many[Chunk]) -> None:
        """Give the log-probabilities of prompts to the requests that want them. hidden: of all tokens, (N, C)."""
        end = n_continued
        for chunk in chunks:
            start, end = end, end + chunk.stop - chunk.start
            sequence = self._active[chunk.slot]
            handle, n_top = sequence.handle, sequence.handle.request.prompt_logprobs
            if n_top is None or sequence.choice != 0:
                continue
            targets = sequence.prompt[chunk.start + 1 : chunk.stop + 1]  # the last token predicts the answer's first
            if targets:
                logits = self.model.output(hidden[start : start + len(targets)])
                handle.prompt_logprobs += log_probabilities(logits, targets, [n_top] * len(targets))

    def _choose(self, hidden: torch.Tensor, n_continued: int, chunks: Many[Chunk]) -> None:
        """Choose a token for every sequence whose prompt has been read. hidden: of all tokens of the step, (N, C)."""
        slots, places = list(range(n_continued)), list(range(n_continued))
        end = n_continued
        for chunk in chunks:
            end += chunk.stop - chunk.start
            if chunk.stop == chunk.prompt_length:
                slots.append(chunk.slot)
                places.append(end - 1)
        if not slots:
            return
        logits = self.model.output(hidden if len(places) == len(hidden) else hidden[places])  # (B, V)
        sequences = [self._active[slot] for slot in slots]
        chosen = choose(logits, [one.sampling for one in sequences], [one.generator for one in sequences]).tolist()
        wanted = [row for row, one in enumerate(sequences) if one.handle.request.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if wanted:
            n_top = [sequences[row].handle.request.logprobs or 0 for row in wanted]
            found = log_probabilities(logits[wanted], [chosen[row] for row in wanted], n_top)
            logprobs = dict(zip(wanted, found, strict=True))
        for row, (sequence, token) in enumerate(zip(sequences, chosen, strict=True)):
            sequence.add(token, logprobs.get(row))

    def _compact(self) -> None:
        """Move sequences out of the last slots into those of sequences that have ended, in place of them."""
        going = [slot for slot, one in enumerate(self._active) if not one.ended]
        if len(going) == len(self._active):
            return
        partial = going.pop() if going and self._active[going[-1]].unread else None
        kept = len(going)
        free = [slot for slot in range(kept) if self._active[slot].ended]
        for target, source in zip(free, (slot for slot in going if slot >= kept), strict=True):
            self._move(source, target)
        if partial is not None:
            self._move(partial, kept)
        del self._active[kept + (partial is not None) :]

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        self._cache.copy_slot(source, target, self._active[source].held)
        self._prompts.copy_slot(source, target)
        self._active[target] = self._active[source]


def check_prompt(prompt: Many[int], max_length: int, vocab_size: int, name: str = "the prompt") -> None:
    """Raise AdapterError for a prompt that is empty, too long, or holds an id outside the vocabulary."""
    if isinstance(prompt, int | str):
        raise AdapterError(f"{name} is {prompt!r:.60}, not a list of ids: give a list of prompts of ids")
    if not len(prompt):
        raise AdapterError(f"{name} is empty: it needs at least a BOS token")
    if len(prompt) > max_length:
        raise AdapterError(f"{name} has {len(prompt)} tokens, the window holds {max_length}: shorten it")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise AdapterError(f"{name} holds token {wrong}, the vocabulary has {vocab_size}: wrong tokenizer?")
