"""Credentials of URLs are masked wherever they may stand; what is no credential stays."""

import pytest

from rayjobs.storage.credentials import drop_mask, mask_credentials
from rayjobs.storage.paths import resolve_path


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("http://user:password@host:5000/a", "http://***@host:5000/a"),
        ("s3://key:se/cret@bucket/runs", "s3://***@bucket/runs"),
        ("s3://key:sec+re=t@bucket/runs", "s3://***@bucket/runs"),
        ("https://token@host", "https://***@host"),
        ("https://user:p@ss@host/v1", "https://***@host/v1"),
        ("https://host/x?sig=abc%2F&sv=2024", "https://host/x?sig=***&sv=2024"),
        ("https://host/x?a=1&X-Amz-Signature=abc#b", "https://host/x?a=1&X-Amz-Signature=***#b"),
        ("https://host/v1?api_key=abc", "https://host/v1?api_key=***"),
        ("https://host/v1?key=abc&n=1", "https://host/v1?key=***&n=1"),
        ("run.track.mlflow='http://u:p@h' run.name=a", "run.track.mlflow='http://***@h' run.name=a"),
        ("http://u:p@h and http://v:q@i", "http://***@h and http://***@i"),
        ("rayjobs adapter-train track.api_key=abc run.name=a", "rayjobs adapter-train track.api_key=*** run.name=a"),
        ("password='a b' rest", "password=*** rest"),
        ("{'api_key': 'abc', \"token\": \"d/e\"}", "{'api_key': ***, \"token\": ***}"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ***"),
        ("invalid key sk-proj-0123456789abcdef0123", "invalid key ***"),
        ("hf_ABCDEFGHIJKLMNOPQRST is not allowed", "*** is not allowed"),
    ],
)
def test_credentials_are_masked(url: str, masked: str) -> None:
    assert mask_credentials(url) == masked
    assert mask_credentials({"a": [url, 1, None]}) == {"a": [masked, 1, None]}
    assert mask_credentials(masked) == masked, "what is masked stays as it is"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "https://host:80/v1",
        "https://host:80/users/@me",
        "user@host: a",
        "memory://x",
        "https://host/@scope?tokens",
        "train.token_budget=600 base.tokenizer=/a/tokenizer.model key_variable=OPENAI_API_KEY",
        "unexpected token: 'abcdefghij' of 'tokens': 'abc'",
        "send the header Authorization: Bearer TOKEN",
        "",
    ],
)
def test_anything_else_stays(text: str) -> None:
    assert mask_credentials(text) == text


def test_values_under_a_secret_name_and_those_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "no secret")
    monkeypatch.setenv("SHORT_TOKEN", "test")
    given = {
        "client": {"API_KEY": "abc", "access_key": "", "tokens": "x"},
        "at": ["the correct horse", "a test, no secret"],
    }
    masked = {"client": {"API_KEY": "***", "access_key": "", "tokens": "x"}, "at": ["the ***", "a test, no secret"]}
    assert mask_credentials(given) == masked


def test_a_masked_url_is_read_with_the_credentials_of_the_environment() -> None:
    """cafo-eval reads the settings of its sweep from the sweep's files."""
    assert drop_mask("http://***@host/a") == "http://host/a"
    assert str(resolve_path("memory://***@bucket/a")) == str(resolve_path("memory://bucket/a"))
