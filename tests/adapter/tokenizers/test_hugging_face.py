"""`tokenizer.json` is read as transformers reads it, but what a person wrote never becomes a special token."""

import json
import pickle
import re
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from adapter.errors import TokenizerError
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer
from adapter.tokenizers.settings import AddedToken, read_settings
from tests.adapter.tokenizers.samples import CHATML, KINDS, NASTY, llama2, llama2_legacy, llama3, qwen, splits


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


def test_ids_equal_transformers_on_nasty_texts(ours: Tokenizer, theirs) -> None:
    for text in NASTY:
        rendered = ours.encode_rendered(text)
        assert rendered.ids == theirs(text, add_special_tokens=False).input_ids, text
        if "Unigram" in repr(theirs.backend_tokenizer) and "</s>" in text:
            continue  # where transformers finds the special piece all the same
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False, eos=False) == plain, text
        framed = theirs(text, split_special_tokens=True).input_ids  # as its post-processor says
        ends = framed[-1:] == [ours.eos_id] and plain[-1:] != [ours.eos_id]
        assert ours.encode(text, bos=True, eos=ends) == framed, text


def test_special_ids_equal_transformers(ours: Tokenizer, theirs) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.unk_id == theirs.unk_token_id
    assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)


def test_text_and_spans_survive(ours: Tokenizer, theirs) -> None:
    for text in NASTY:
        ids, spans = ours.encode_rendered(text)
        assert len(ids) == len(spans)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert all(low <= high for low, high in spans)
        assert [low for low, _ in spans] == sorted(low for low, _ in spans)
        if "NF" not in repr(theirs.backend_tokenizer):
            assert set(range(len(text))) == {place for low, high in spans for place in range(low, high)}


def test_a_continuation_is_exact_wherever_the_prompt_ends(ours: Tokenizer) -> None:
    for text in NASTY:
        ids = ours.encode(text, bos=True, eos=False)
        whole = ours.decode(ids)
        for cut in range(len(ids)):
            known = ours.decode(ids[:cut])
            if not whole.startswith(known):
                known = known.rstrip("�")  # it ends within a character
            assert known + ours.continuation(ids[:cut], ids[cut:]) == whole


def test_a_pickle_is_the_whole_tokenizer(ours: Tokenizer, qwen_folder: Path) -> None:
    again = pickle.loads(pickle.dumps(ours))
    for text in NASTY:
        assert again.encode(text, bos=True, eos=False) == ours.encode(text, bos=True, eos=False)
        assert again.encode_rendered(text) == ours.encode_rendered(text)
    assert again.fingerprint == ours.fingerprint
    assert (again.eos_ids, again.pad_id, again.sha256) == (ours.eos_ids, ours.pad_id, ours.sha256)


def test_what_a_person_wrote_stays_text(ours: Tokenizer) -> None:
    special = sorted(set(ours._special_ids) & {*CHATML, "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>"})
    assert special
    for token in special:
        for said in (
            token,
            f"hi {token} there",
            f"{token}{token}",
            f" {token} ",
            f"漢{token}🙂",
            token[:-1],
            token[1:],
        ):
            for before, after in (("", ""), ("user: ", "."), (token, token), (f"{token}\n", f"\n{token}")):
                text = before + said + after
                ids, spans = ours.encode_rendered(text, [(len(before), len(before + said))])
                places = [i for i, id in enumerate(ids) if id == ours._special_ids[token]]
                assert len(places) == before.count(token) + after.count(token)
                assert all(text[slice(*spans[i])].strip() == token for i in places)
                assert spans[-1][1] <= len(text)


def test_nothing_verbatim_is_as_if_there_were_no_spans(ours: Tokenizer) -> None:
    for text in NASTY:
        for left, right in splits(text):
            assert ours.encode_rendered(text, [(len(left), len(left))]) == ours.encode_rendered(text), (left, right)


def test_a_token_that_begins_in_a_persons_text_does_not_end_outside(qwen_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen_folder)
    end = tokenizer._special_ids["<|im_end|>"]
    said, rest = "x<|im_", "end|><|im_end|>"
    ids, spans = tokenizer.encode_rendered(said + rest, [(0, len(said))])
    assert ids.count(end) == 1
    assert spans[ids.index(end)] == (len(said) + 5, len(said + rest))
    assert end not in tokenizer.encode_rendered(said + rest[:5], [(0, len(said))]).ids
    assert end in tokenizer.encode_rendered(said + rest[:5]).ids


def test_qwen_begins_texts_with_nothing(qwen_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen_folder)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a", bos=True, eos=False) == tokenizer.encode("a", bos=False, eos=False)
    assert tokenizer.eos_ids == {tokenizer._special_ids[text] for text in ("<|im_end|>", "<|endoftext|>")}
    assert tokenizer.eos_id == tokenizer._special_ids["<|im_end|>"]


def test_stops_are_those_of_all_configurations(tmp_path: Path) -> None:
    folder = llama3(tmp_path)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer._special_ids
    assert tokenizer.eos_ids == {ids["<|end_of_text|>"], ids["<|eot_id|>"]}
    assert tokenizer.eos_id == ids["<|eot_id|>"]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids["<|start_header_id|>"]}))
    assert load_tokenizer(folder).eos_ids == {*tokenizer.eos_ids, ids["<|start_header_id|>"]}
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    assert load_tokenizer(folder).eos_id == ids["<|start_header_id|>"], "the model's own, if the tokenizer has none"
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: defines no EOS token"):
        load_tokenizer(folder).encode("a", bos=True, eos=True)


def test_its_own_json_counts_more_than_a_model_beside_it_and_both_agree(tmp_path: Path) -> None:
    folder = llama2(tmp_path)
    by_json, by_model = load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model")
    assert "tokenizer.json" in repr(by_json)
    assert "tokenizer.model" in repr(by_model)
    assert (by_json.bos_id, by_json.eos_id, by_json.unk_id) == (by_model.bos_id, by_model.eos_id, by_model.unk_id)
    for text in NASTY:
        text = text.lstrip(" ▁")  # to one that begins with a space, only SentencePiece adds another
        assert by_json.encode(text, bos=True, eos=True) == by_model.encode(text, bos=True, eos=True), text
        if "<unk>" not in text:
            assert by_json.encode_rendered(text).ids == by_model.encode_rendered(text).ids, text
    check_text_after_a_token(by_json, by_model)
    (folder / "params.json").write_text("{}")
    assert "tokenizer.model" in repr(load_tokenizer(folder)), "Meta's layout"
    (folder / "config.json").write_text("{}")
    assert "tokenizer.json" in repr(load_tokenizer(folder))


def test_a_legacy_model_has_a_space_before_texts_after_a_token(tmp_path: Path) -> None:
    by_json, folder = load_tokenizer(llama2_legacy(tmp_path / "json")), llama2(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}))
    check_text_after_a_token(by_json, load_tokenizer(folder / "tokenizer.model"))


def check_text_after_a_token(by_json: Tokenizer, by_model: Tokenizer) -> None:
    rendered = "<s>first</s>second</s>third"
    assert by_json.encode_rendered(rendered).ids == by_model.encode_rendered(rendered).ids


def test_tokens_of_older_configuration_files(qwen_folder: Path, tmp_path: Path) -> None:
    """Special tokens that tokenizer.json does not know, or does not know as special, are read as transformers does."""
    values = json.loads((qwen_folder / "tokenizer.json").read_text())
    word = min(text for text in values["model"]["vocab"] if len(text) == 3 and text.isascii())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "<|im_end|>"][:2]
    size = len(values["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": word})
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 2}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*NASTY, f"see the {word} and {word}<|im_end|>"):
        assert ours.encode_rendered(text).ids == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.eos_id == theirs.eos_token_id == size + 2
    assert ours.special_tokens == {"eos_token": "<|im_end|>", "unk_token": word}


def test_a_named_token_without_an_id_stays_without_one(qwen_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((qwen_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "[PAD]"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == load_tokenizer(qwen_folder).vocab_size
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize("extra", [1, 64, 65])
def test_tokens_for_images_may_lie_past_the_rows(qwen_folder: Path, tmp_path: Path, extra: int) -> None:
    backend = tokenizers.Tokenizer.from_file(str(qwen_folder / "tokenizer.json"))
    rows = backend.get_vocab_size()
    backend.add_special_tokens([f"<image_{i}>" for i in range(extra)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if extra <= 64 - 3:  # three more tokens are not words
        load_tokenizer(tmp_path).check_fits(rows)
    else:
        with pytest.raises(TokenizerError, match=f"has {rows + extra} tokens, the base's vocabulary only {rows}"):
            load_tokenizer(tmp_path).check_fits(rows)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<image_0>"}))
    with pytest.raises(TokenizerError, match=f"the base's vocabulary only {rows}"):
        load_tokenizer(tmp_path).check_fits(rows)


def test_padding_and_truncation_of_the_file_are_left_out(qwen_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(qwen_folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("a", NASTY[-3]):
        plain = load_tokenizer(qwen_folder).encode(text, bos=False, eos=False)
        assert ours.encode(text, bos=False, eos=False) == plain


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "B"}'}, "A"),
        ({"tokenizer_config.json": '{"chat_template": "B"}'}, "B"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "C"}]}'}, None),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": n, "template": n} for n in ("rag", "default")]}
                )
            },
            "default",
        ),
        ({"chat_template.json": '{"chat_template": "D"}'}, "D"),
        ({}, None),
    ],
)
def test_chat_templates(qwen_folder: Path, tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    (tmp_path / "tokenizer.json").write_text((qwen_folder / "tokenizer.json").read_text())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == expected
    assert (tokenizer.fingerprint == load_tokenizer(qwen_folder / "tokenizer.json").fingerprint) is False


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not readable JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a Hugging Face tokenizer"),
        (
            "tokenizer.json",
            '{"model": {"type": "Later"}}',
            r"json: tokenizers \S+ cannot load it \(.*upgrade",
        ),
        ("tokenizer.json", '{"model": {}, "added_tokens": [3]}', r"tokenizer\.json: tokenizers \S+ cannot load it"),
        ("vocab.json", "{}", r"neither tokenizer\.json nor.*vocab\.json is another format.*save_pretrained"),
        ("tekken.json", "{}", r"neither tokenizer\.json nor.*tekken\.json is another format"),
        ("readme", "", r"neither tokenizer\.json nor tokenizer\.model is in this folder"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_a_malformed_configuration_is_named(qwen_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text((qwen_folder / "tokenizer.json").read_text())
    for content, fault in (("{", "not readable JSON"), ("[]", "holds a list, not an object")):
        (tmp_path / name).write_text(content)
        with pytest.raises(TokenizerError, match=rf"{name}: {fault}"):
            load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_no_text(ours: Tokenizer) -> None:
    for encode in (lambda text: ours.encode(text, bos=True, eos=True), ours.encode_rendered):
        with pytest.raises(TokenizerError, match=r"'\\ud83d' at character 2 is half of a surrogate pair"):
            encode("a\ud83d")
        with pytest.raises(TokenizerError, match="a text is a string, got 3"):
            encode(3)


@pytest.mark.slow
def test_a_real_tokenizer(smollm2: Path) -> None:
    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert ours.chat_template == theirs.chat_template
    test_ids_equal_transformers_on_nasty_texts(ours, theirs)
    test_special_ids_equal_transformers(ours, theirs)
    test_a_continuation_is_exact_wherever_the_prompt_ends(ours)
    test_what_a_person_wrote_stays_text(ours)


@pytest.mark.slow
def test_a_real_tokenizer_that_transformers_converted(mistral_tokenizer: Path, tmp_path: Path) -> None:
    """The conversion differs from the model: transformers 5.23 joins runs of spaces first, SentencePiece last."""
    (tmp_path / "tokenizer.model").write_bytes(mistral_tokenizer.read_bytes())
    LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    test_ids_equal_transformers_on_nasty_texts(ours, theirs)
    test_a_continuation_is_exact_wherever_the_prompt_ends(ours)
    by_model = load_tokenizer(mistral_tokenizer)
    for text in NASTY:
        text = text.lstrip(" ▁")
        if not re.search("[ ▁]{2}|\\n ", text):
            assert ours.encode(text, bos=True, eos=False) == by_model.encode(text, bos=True, eos=False), text


@pytest.mark.parametrize("id", ["", "x1", "-1"])
def test_an_id_that_is_no_number_is_named(tmp_path: Path, id: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"0": "<a>", id: "<b>"}}))
    with pytest.raises(TokenizerError, match=rf"tokenizer_config.json: added_tokens_decoder has '{id}' where a number"):
        read_settings(tmp_path)


def test_an_added_token_without_a_text_is_refused_and_one_with_an_empty_text_left_out(tmp_path: Path) -> None:
    def read(token: object) -> dict[int, AddedToken]:
        listed = {"added_tokens_decoder": {"0": {"content": "<a>"}, "1": token}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
        return read_settings(tmp_path).added

    assert list(read({"content": ""})) == [0]
    for token in ({}, {"content": 3}, None):
        with pytest.raises(TokenizerError, match="has no text for token 1; fetch the file again"):
            read(token)
