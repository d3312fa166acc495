"""Load a tokenizer from a file or folder, in whatever format it is."""

from pathlib import Path

from adapter.errors import TokenizerError
from adapter.file_kind import check_content
from adapter.gguf_file import find_gguf, is_gguf
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.gguf import read_gguf_tokenizer
from adapter.tokenizers.hugging_face import read_tokenizer_json
from adapter.tokenizers.sentence_piece import read_sentence_piece
from adapter.tokenizers.settings import read_settings
from adapter.tokenizers.tiktoken_ranks import is_ranks, read_ranks

_OTHER_FORMATS = ("vocab.json", "tekken.json", "spiece.model", "*.tiktoken", "tokenization_*.py")
"""Files of tokenizers that only other programs read."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file, or that of a folder (`find_tokenizer`), with the configuration files beside it.

    The format is recognised by the content: Hugging Face's `tokenizer.json`, a SentencePiece model, Llama 3's
    ranks, or the metadata of a GGUF file.
    Raises TokenizerError for a file that is missing, corrupt, or in no known format.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise TokenizerError(describe_missing(path))
        path = found
    if is_gguf(path):
        return read_gguf_tokenizer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: no tokenizer can be read there ({error.strerror})") from error
    check_content(path, TokenizerError)
    settings = read_settings(path.parent)
    if content.lstrip()[:1] == b"{":
        return read_tokenizer_json(content, str(path), settings)
    if is_ranks(content):
        return read_ranks(content, path, settings)
    return read_sentence_piece(content, str(path), settings)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer of a folder, if it has one.

    Where there are two of the same vocabulary, `tokenizer.json` is the one that a Hugging Face folder's model is used
    with, and `tokenizer.model` the one of Meta's. A GGUF file has its own, which counts if the folder has no other.
    """
    meta = (folder / "params.json").is_file() and not (folder / "config.json").is_file()
    names = ("tokenizer.model", "tokenizer.json") if meta else ("tokenizer.json", "tokenizer.model")
    models = find_gguf(folder)
    files = [*(folder / name for name in names), *models[: len(models) == 1]]
    return next((file for file in files if file.is_file()), None)


def describe_missing(folder: Path) -> str:
    """A folder's lack of a tokenizer, in words, and what to do."""
    others = [file.name for pattern in _OTHER_FORMATS for file in sorted(folder.glob(pattern))]
    hint = "put it there, or name it"
    if others:
        convert = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        hint = f"{others[0]} is another format, from which transformers can make the former: {convert}"
    return f"{folder}: neither tokenizer.json nor tokenizer.model is in this folder; {hint}"
