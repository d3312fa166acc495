"""Load a tokenizer from a file or folder, in whatever format it is."""

import re
from pathlib import Path

from adapter.errors import TokenizerError
from adapter.file_kind import check_content
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.sentence_piece import SentencePieceTokenizer

_JSON_ONLY = (
    "{}: a Hugging Face fast tokenizer, which a later release will read; this one needs the SentencePiece "
    "tokenizer.model that belongs to the same weights: put it into the folder, or name it"
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""The first line of Llama 3's `tokenizer.model`: a token in base64 and its rank."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file, or that of a folder.

    Raises TokenizerError for a file that is missing, corrupt, or in no known format.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.model").is_file() and (path / "tokenizer.json").is_file():
            raise TokenizerError(_JSON_ONLY.format(path / "tokenizer.json"))
        path = path / "tokenizer.model"
    if path.suffix == ".json":
        raise TokenizerError(_JSON_ONLY.format(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: no tokenizer can be read there ({error.strerror})") from error
    check_content(path, TokenizerError)
    if _TIKTOKEN.match(content):
        raise TokenizerError(
            f"{path}: Llama 3's tokenizer, in tiktoken's format, which a later release will read; this one needs a "
            "SentencePiece model, as LLaMA 1 and 2 have"
        )
    return SentencePieceTokenizer(content, str(path))
