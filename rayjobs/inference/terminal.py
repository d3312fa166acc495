"""Answer what is typed on the terminal: an instruction a line, or a conversation."""

import logging
import sys
from collections.abc import Callable

from adapter.errors import AdapterError
from adapter.records.files import check_text
from rayjobs.errors import DataError
from rayjobs.inference.batch import Record

logger = logging.getLogger(__name__)

RESET, EXIT = "/reset", "/exit"
"""Lines that begin another conversation, and that end the program."""

Answer = Callable[[Record], str]
"""record → the answer, which it also prints."""
FindError = Callable[[Record], str]
"""record → why it cannot be answered, or an empty text."""


def answer_lines(answer: Answer, find_error: FindError) -> list[str]:
    """Answer each line that is typed as an instruction, until the end of the input or Ctrl-C; return the answers.

    A line that cannot be answered is reported, and the next is read.
    """
    answers = list[str]()

    def act(line: str) -> None:
        record = {"instruction": line, "input": ""}
        if line and _is_answerable(line, record, find_error):
            answers.append(answer(record))

    _read_lines(act, "instruction> ")
    return answers


def converse(answer: Answer, find_error: FindError) -> list[str]:
    """Answer each line that is typed as the next turn of a conversation; return the answers.

    An empty line or /reset begins another conversation; /exit, the end of the input or Ctrl-C ends it. A line that
    cannot be answered is reported and is no turn.
    """
    answers, history = list[str](), list[dict[str, str]]()

    def act(line: str) -> None:
        if line == EXIT:
            raise EOFError  # ends the reading, as the end of the input does
        if line in ("", RESET):
            history.clear()
            return
        turn = {"role": "user", "content": line}
        record = {"messages": [*history, turn]}
        if _is_answerable(line, record, find_error):
            text = answer(record)
            answers.append(text)
            history.extend([turn, {"role": "assistant", "content": text}])

    _read_lines(act, "you> ")
    return answers


def _read_lines(act: Callable[[str], None], prompt: str) -> None:
    """Do something with each line, without the space around it, until the end of the input or Ctrl-C.

    prompt: shown before each line that a person types.
    """
    prompt = prompt if sys.stdin.isatty() else ""
    while True:
        try:
            act(input(prompt).strip())
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()  # the shell's own prompt begins a new line
            return
        except UnicodeDecodeError as error:
            raise DataError(f"the instructions on standard input are not UTF-8: {error}") from error


def _is_answerable(line: str, record: Record, find_error: FindError) -> bool:
    try:
        check_text(line, "the line")
        error = find_error(record)
    except AdapterError as problem:
        error = str(problem)
    if error:
        logger.error("not answered: %s", error)
    return not error
