"""Encode records as token ids with labels, for training, and as prompts, for generation.

    instruction  {instruction, input?, output}   the template's prompt, then output and EOS, which are labelled
    conversation {messages, tools?}              one sequence, in which the assistant's turns are labelled
    completion   {prompt, completion}            the prompt as it stands, then completion and EOS, which are labelled
    text         {text}                          BOS, then text and EOS, which are labelled

An image is a path and no part of the sequence. `adapter.records.chat_encoding` puts conversations into a model's chat
template, `adapter.records.turns` into a prompt template.
"""

from adapter.errors import RecordError
from adapter.records.chat_encoding import chat_prompt, encode_chat, encode_chat_instruction, instruction_message
from adapter.records.example import Example, Prompt, Record, encode_answered, shorten_answer
from adapter.records.turns import encode_turns, turns_prompt
from adapter.templates import ALPACA, PromptTemplate, Template
from adapter.tokenizers.base import Tokenizer


def encode_record(
    record: Record, tokenizer: Tokenizer, template: Template = ALPACA, *, max_length: int = 512
) -> Example:
    """Encode a record in at most `max_length` ids.

    A conversation that is too long loses its oldest turns whole; its system message stays. An instruction loses tokens
    from the left of its input, a completion from the left of its prompt. Where that is not enough, the last answer
    loses tokens from its right; its end token stays. A text loses its right, with EOS.

    Raises RecordError if not even one token of the answer would be left, or the template refuses the record.
    """
    if "text" in record:
        return encode_text(record, tokenizer, max_length=max_length)[0]
    if "prompt" in record:
        return _encode_completion(record, tokenizer, max_length)
    if isinstance(template, PromptTemplate):
        if "messages" in record:
            return encode_turns(record["messages"], tokenizer, template, max_length)
        return _encode_instruction(record, tokenizer, template, max_length)
    if "messages" in record:
        return encode_chat(record["messages"], record.get("tools"), tokenizer, template, max_length)
    return encode_chat_instruction(record, tokenizer, template, max_length)


def encode_text(record: Record, tokenizer: Tokenizer, *, max_length: int) -> list[Example]:
    """Encode a plain text as one sequence, or as several if it is too long; each begins with BOS, the last has EOS.

    Raises RecordError for an empty text.
    """
    if not record["text"]:
        raise RecordError("the text is empty")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(record["text"], bos=False, eos=True)
    size, first = max_length - len(begin), max(1, len(begin))  # nothing predicts the first id of a sequence
    parts = [begin + ids[start : start + size] for start in range(0, len(ids), size)]
    return [Example(ids=part, label_spans=[(first, len(part))]) for part in parts if len(part) > first]


def encode_prompt(
    record: Record, tokenizer: Tokenizer, template: Template = ALPACA, *, window: int, reserve: int = 1
) -> Prompt:
    """Encode what is to be answered.

    record: as for `encode_record`, without the answer. Messages end with a turn of the user or of a tool. window: of
    the base. reserve: tokens of it that are for the answer. A conversation that leaves less loses its oldest turns
    whole; its system message and its last question stay.

    Raises RecordError for a prompt that fills the window, and for one that the template refuses.
    """
    room = max(1, window - reserve)
    if "prompt" in record:
        prompt = Prompt(ids=tokenizer.encode(record["prompt"], bos=True, eos=False))
    elif not isinstance(template, PromptTemplate):
        messages = record["messages"] if "messages" in record else [instruction_message(record)]
        prompt = chat_prompt(messages, record.get("tools"), tokenizer, template, room)
    elif "messages" in record:
        prompt = turns_prompt(record["messages"], tokenizer, template, room)
    else:
        text = template.render(record["instruction"], record.get("input") or "")
        prompt = Prompt(ids=tokenizer.encode(text, bos=True, eos=False))
    if len(prompt.ids) >= window:
        raise RecordError(
            f"the prompt has {len(prompt.ids)} tokens, which leaves no room for an answer in the base's window of "
            f"{window}"
        )
    if not prompt.ids:
        raise RecordError("the prompt is empty, and the tokenizer has no token that begins a text")
    return prompt


def _encode_instruction(record: Record, tokenizer: Tokenizer, template: PromptTemplate, max_length: int) -> Example:
    """Encode an instruction as BOS + prompt + output + EOS."""
    instruction, output, input = record["instruction"], record["output"], record.get("input") or ""
    prompt, answer = encode_answered(template.render(instruction, input), output, tokenizer)
    pieces = tokenizer.encode(input, bos=False, eos=False) if input else []
    while pieces and len(prompt) + len(answer) > max_length:
        pieces = pieces[len(prompt) + len(answer) - max_length :]
        input = tokenizer.decode(pieces)
        prompt, answer = encode_answered(template.render(instruction, input), output, tokenizer)
    answer = shorten_answer(answer, len(prompt), max_length, tokenizer)
    return Example(ids=prompt + answer, label_spans=[(len(prompt), len(prompt) + len(answer))], input=input)


def _encode_completion(record: Record, tokenizer: Tokenizer, max_length: int) -> Example:
    """Encode a prompt and its completion without any template; the prompt loses its left where both are too long."""
    prompt, answer = encode_answered(record["prompt"], record["completion"], tokenizer)
    begin = int(tokenizer.bos_id is not None)
    excess = max(0, len(prompt) + len(answer) - max_length)
    prompt = prompt[:begin] + prompt[begin + excess :]
    answer = shorten_answer(answer, len(prompt), max_length, tokenizer)
    start = max(1, len(prompt))  # nothing predicts the first id of a sequence
    return Example(ids=prompt + answer, label_spans=[(start, len(prompt) + len(answer))])
