"""Many requests in one batch against each of them alone, with its adapter on the model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder
from adapter.decoder import Decoder
from adapter.engine.adapters import AdapterStore, UnknownAdapterError
from adapter.engine.engine import Engine
from adapter.engine.prepacking import prepack_weights
from adapter.engine.request import Event, QueueFullError, Request
from adapter.errors import AdapterError, CheckpointError
from adapter.generate import generate
from adapter.generation_config import GenerationConfig
from adapter.image_projection import ImageProjectionConfig
from adapter.methods.base import AdapterMethod
from adapter.methods.bias import BiasConfig
from adapter.methods.full import FullConfig
from adapter.methods.ia3 import IA3Config
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config
from adapter.tokenizers.load import load_tokenizer
from tests.adapter.models import GQA, llama, tokens

SHAPE: dict[str, Any] = {**GQA, "n_layers": 4, "max_seq_len": 43}
ADAPTERS: dict[str, AdapterMethod] = {
    "short": AdaptionConfig(n_layers=3, prompt_length=2),
    "long": AdaptionConfig(n_layers=2, prompt_length=7, gate="identity"),
    "all": AdaptionConfig(n_layers=4, prompt_length=5, gate="one"),
    "prefix": AdaptionConfig(n_layers=3, prompt_length=3, gate="prefix"),
    "lora": LoraConfig(rank=3, targets=("wq", "wv", "w2")),
    "rank": LoraConfig(rank=5, n_layers=2),
    "ia3": IA3Config(),
    "bias": BiasConfig(),
    "v2": V2Config(n_layers=2, prompt_length=3),
    "sees": AdaptionConfig(n_layers=3, prompt_length=5, vision=ImageProjectionConfig(widths=(5, 3), bottleneck=4)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file of each adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        extract_adapter(llama(SHAPE, config, seed=seed)).save(folder / f"{name}.safetensors")
    return folder


def engine_of(folder: Path, model: Decoder | None = None, **settings: Any) -> Engine:
    model = model or llama(SHAPE)
    store = AdapterStore(model, cache_bytes=settings.pop("cache_bytes", 2**20))
    for name in ADAPTERS:
        store.register(name, folder / f"{name}.safetensors")
    return Engine(model, adapters=store, **settings)


def alone(folder: Path, request: Request) -> list[int]:
    """The request's answer from a model that holds its adapter and sees nothing else."""
    model = llama(SHAPE)
    if request.adapter:
        apply_adapter(model, read_adapter(folder / f"{request.adapter}.safetensors"))
    images = None if request.image is None else [request.image]
    return generate(model, [request.prompt], request.config, eos_ids=request.stop_ids or (), images=images)[0]


def mixed_requests(n: int) -> list[Request]:
    rng = torch.Generator().manual_seed(0)
    names = [None, *ADAPTERS]
    requests = []
    for i in range(n):
        length = int(torch.randint(1, 31, (), generator=rng))
        name = names[i % len(names)]
        requests.append(
            Request(
                prompt=tokens(1, length, seed=i)[0].tolist(),
                adapter=name,
                image=torch.randn(8, generator=rng) if name == "sees" and i % 4 else None,
                config=GenerationConfig(max_new_tokens=1 + i % 13, temperature=0.0 if i % 4 < 3 else 1.0, seed=100 + i),
                stop_ids={i % 101, (7 * i) % 101},
            )
        )
    return requests


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    return [alone(folder, request) for request in mixed_requests(64)]


@pytest.mark.parametrize("settings", [{"slots": 5, "prefill_tokens": 7}, {"slots": 64, "prefill_tokens": 999}], ids=str)
def test_64_mixed_requests_answer_as_each_does_alone(folder, expected, settings):
    engine, requests = engine_of(folder, **settings), mixed_requests(64)
    handles = [engine.submit(request) for request in requests]
    engine.run()
    assert [handle.choices[0].ids for handle in handles] == expected
    assert {handle.choices[0].finish for handle in handles} == {"stop", "length"}
    assert len({tuple(ids) for ids in expected}) > 40


@torch.no_grad()
def test_a_row_without_adapter_is_the_base_to_the_bit_beside_rows_with_one(folder):
    engine, prompt = engine_of(folder), [3, 5, 8]
    outputs = []
    engine.model.output.register_forward_hook(lambda _, __, logits: outputs.append(logits))
    config = GenerationConfig(max_new_tokens=4, temperature=0)
    for others in (["short", "v2", "prefix"], [None, None, None]):
        outputs.clear()
        for name in [*others, None]:
            engine.submit(Request(prompt=prompt, adapter=name, config=config, stop_ids=()))
        engine.run()
        kept = [logits[-1] for logits in outputs]
        if others[0]:
            beside = kept
    assert all(torch.equal(one, other) for one, other in zip(beside, kept, strict=True))


@pytest.mark.parametrize("own", ["v2", "lora", "short"])
def test_a_models_own_adapter_serves_who_names_none(folder, own):
    """Beside requests with another, and unchanged by them."""
    model = llama(SHAPE)
    apply_adapter(model, read_adapter(folder / f"{own}.safetensors"))
    config = GenerationConfig(max_new_tokens=7, temperature=0)
    before = generate(model, [[3, 5]], config, eos_ids=())
    engine = engine_of(folder, model)
    requests = [Request(prompt=[3, 5], adapter=name, config=config, stop_ids=()) for name in (None, "ia3", "v2")]
    handles = [engine.submit(request) for request in requests]
    engine.run()
    named = [Request(prompt=[3, 5], adapter=name, config=config, stop_ids=()) for name in (own, "ia3", "v2")]
    assert [handle.choices[0].ids for handle in handles] == [alone(folder, request) for request in named]
    assert generate(model, [[3, 5]], config, eos_ids=()) == before


def test_requests_come_and_go_while_others_run(folder):
    engine, requests = engine_of(folder, slots=3, prefill_tokens=4), mixed_requests(12)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        engine.step()
        assert engine.n_active <= 3
    engine.run()
    assert [handle.choices[0].ids for handle in handles] == [alone(folder, request) for request in requests]


def test_n_continuations_are_those_of_equal_prompts_in_one_batch():
    model, prompt = llama(SHAPE), [4, 9]
    config = GenerationConfig(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=5)
    engine = Engine(model)
    handle = engine.submit(Request(prompt=prompt, config=config, stop_ids=(), n=3))
    engine.run()
    assert [choice.ids for choice in handle.choices] == generate(model, [prompt] * 3, config, eos_ids=())


def test_events_add_up_and_log_probabilities_are_the_models(folder):
    events: list[Event] = []
    engine = engine_of(folder)
    config = GenerationConfig(max_new_tokens=5, temperature=0)
    request = Request(prompt=[3, 5], adapter="long", config=config, stop_ids=(), logprobs=3)
    handle = engine.submit(request, events.append)
    engine.submit(Request(prompt=[7], config=config, stop_ids=()))
    engine.run()
    (choice,) = handle.choices
    assert [token for event in events for token in event.ids] == choice.ids
    assert [event.finish for event in events] == [None] * 4 + ["length"]
    model = llama(SHAPE)
    apply_adapter(model, read_adapter(folder / "long.safetensors"))
    with torch.no_grad():
        expected = model(torch.tensor([[3, 5, *choice.ids]]))[0].log_softmax(-1)
    for place, (token, found) in enumerate(zip(choice.ids, choice.logprobs, strict=True)):
        row = expected[1 + place]
        assert found.id == token
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [id for id, _ in found.top] == row.topk(3).indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_cancelled_request_frees_its_slot_at_once(folder):
    engine = engine_of(folder, slots=1)
    config = GenerationConfig(max_new_tokens=30, temperature=0)
    first, second = (engine.submit(Request(prompt=[n], config=config, stop_ids=())) for n in (3, 4))
    third = engine.submit(Request(prompt=[5], config=config, stop_ids=()))
    engine.step()
    assert len(first.choices[0].ids) == 1
    first.cancel()
    third.cancel()
    engine.step()
    assert (first.choices[0].finish, third.choices[0].finish) == ("cancelled", "cancelled")
    assert len(second.choices[0].ids) == 1
    engine.run()
    assert second.choices[0].ids == alone(folder, second.request)


def test_a_prompt_that_is_being_read_can_be_cancelled(folder):
    engine = engine_of(folder, slots=2, prefill_tokens=5)
    config = GenerationConfig(max_new_tokens=9, temperature=0)
    short = engine.submit(Request(prompt=[3, 4], config=config, stop_ids=()))
    long = engine.submit(Request(prompt=list(range(20)), config=config, stop_ids=()))
    engine.step()
    engine.step()
    assert engine.n_active == 2
    assert not long.choices[0].ids
    long.cancel()
    last = engine.submit(Request(prompt=[9] * 8, adapter="short", config=config, stop_ids=()))
    engine.run()
    for handle in (short, last):
        assert handle.choices[0].ids == alone(folder, handle.request)


def test_the_queue_is_bounded(folder):
    engine = engine_of(folder, slots=1, max_waiting=2)
    engine.submit(Request(prompt=[1], stop_ids=(), n=2))
    with pytest.raises(QueueFullError, match="2 sequences wait already, at most 2 may"):
        engine.submit(Request(prompt=[1], stop_ids=()))
    engine.step()
    engine.submit(Request(prompt=[1], stop_ids=()))


def test_a_broken_adapter_fails_its_own_request_alone(folder, tmp_path):
    engine = engine_of(folder)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    extract_adapter(llama({**SHAPE, "dim": 36}, ADAPTERS["short"])).save(tmp_path / "foreign.safetensors")
    config = GenerationConfig(max_new_tokens=5, temperature=0)
    extract_adapter(llama(SHAPE, FullConfig())).save(tmp_path / "full.safetensors")
    broken = []
    for name in ("broken", "foreign", "absent", "full"):
        engine.adapters.register(name, tmp_path / f"{name}.safetensors")
        broken.append(engine.submit(Request(prompt=[3], adapter=name, config=config, stop_ids=())))
    blind = engine.submit(Request(prompt=[3], adapter="short", image=torch.zeros(8), config=config, stop_ids=()))
    wrong = engine.submit(Request(prompt=[3], adapter="sees", image=torch.zeros(9), config=config, stop_ids=()))
    right = engine.submit(Request(prompt=[3], adapter="short", config=config, stop_ids=()))
    engine.run()
    assert all(isinstance(handle.error, CheckpointError | OSError) for handle in broken)
    assert {handle.choices[0].finish for handle in [*broken, blind, wrong]} == {"error"}
    assert "made for text alone" in str(blind.error)
    assert "reads 8 features of an image, got (9,)" in str(wrong.error)
    assert right.choices[0].ids == alone(folder, right.request)


def test_adapters_come_and_go_and_the_least_recently_used_leave_memory_first(folder):
    engine = engine_of(folder)
    store = engine.adapters
    sizes = {name: store.get(name).prompts.n_bytes for name in ("short", "long", "all")}
    assert store.cached_bytes == sum(sizes.values())
    store = engine_of(folder, cache_bytes=sizes["short"] + sizes["long"]).adapters
    first = store.get("short")
    store.get("long")
    assert store.get("short") is first, "computed once"
    store.get("all")
    assert store.cached_bytes == sizes["all"], "which alone is too large"
    assert store.get("short") is not first
    store.remove("short")
    with pytest.raises(UnknownAdapterError, match="no adapter 'short'; known: all, bias, ia3, long, lora, …"):
        engine_of(folder, cache_bytes=0).adapters.remove("short") or store.get("short")
    store.register("short", folder / "long.safetensors")
    assert torch.equal(store.get("short").prompts.keys_values, store.get("long").prompts.keys_values)


def test_removing_an_adapter_does_not_disturb_the_sequences_that_have_it(folder):
    engine = engine_of(folder, cache_bytes=0)
    request = Request(
        prompt=[3], adapter="short", config=GenerationConfig(max_new_tokens=9, temperature=0), stop_ids=()
    )
    handle = engine.submit(request)
    engine.step()
    engine.adapters.remove("short")
    engine.run()
    assert handle.choices[0].ids == alone(folder, request)


@torch.no_grad()
def test_log_probabilities_of_prompts_are_those_of_the_plain_forward(folder):
    """The prompts are read in parts, beside others, and once for all continuations."""
    engine, prompts = engine_of(folder, slots=3, prefill_tokens=4), [[3, 5, 8, 1, 2, 9, 4], [7], [2, 6]]
    config = GenerationConfig(max_new_tokens=3, temperature=0)
    requests = [
        Request(prompt=prompt, adapter="v2", config=config, stop_ids=(), prompt_logprobs=2, n=2) for prompt in prompts
    ]
    handles = [engine.submit(request) for request in requests]
    engine.run()
    model = llama(SHAPE)
    apply_adapter(model, read_adapter(folder / "v2.safetensors"))
    for prompt, handle in zip(prompts, handles, strict=True):
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
        assert [one.id for one in handle.prompt_logprobs] == prompt[1:]
        for row, token, found in zip(expected[:-1], prompt[1:], handle.prompt_logprobs, strict=True):
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [id for id, _ in found.top] == row.topk(2).indices.tolist()


def test_the_stop_id_has_a_log_probability_and_is_no_part_of_the_answer(folder):
    config = GenerationConfig(max_new_tokens=5, temperature=0)
    (ids,) = generate(llama(SHAPE), [[3, 5]], config, eos_ids=())
    engine = engine_of(folder)
    handle = engine.submit(Request(prompt=[3, 5], config=config, stop_ids={ids[2]}, logprobs=0))
    engine.run()
    (choice,) = handle.choices
    assert (choice.ids, [one.id for one in choice.logprobs]) == (ids[:2], ids[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 44}, "has 44 tokens, the window holds 43"),
        ({"prompt": [101]}, "holds token 101"),
        ({"prompt": [1], "adapter": "absent"}, "no adapter 'absent'; known: all, bias, ia3, long, lora, …"),
        ({"prompt": [1], "stop": ["x"]}, "needs stop_ids, and finds no stop strings"),
        ({"prompt": [1], "stop": ["x", ""]}, "strings that are not empty"),
        ({"prompt": [1], "top_k": -1}, "top_k must be 0"),
        ({"prompt": [1], "n": 0}, "n must be at least 1"),
        ({"prompt": [1], "logprobs": -1}, "logprobs must be None or at least 0"),
        ({"prompt": [1], "prompt_logprobs": -1}, "prompt_logprobs must be None or at least 0"),
    ],
)
def test_wrong_requests_are_refused_at_once(folder, settings, message):
    engine = engine_of(folder)
    with pytest.raises(AdapterError, match=message):
        engine.submit(Request(stop_ids=(), **settings))
    assert not engine.busy


@pytest.mark.slow
def test_mixed_requests_to_a_real_llama_answer_as_each_does_alone(smollm2, tmp_path):
    model, config = load_decoder(smollm2), GenerationConfig(max_new_tokens=5, temperature=0)
    tokenizer = load_tokenizer(smollm2)
    for seed in range(3):
        model.add_adapter(
            AdaptionConfig(n_layers=28 - seed, prompt_length=10 - seed), torch.Generator().manual_seed(seed)
        )
        for adaption in model.adaptions:
            torch.nn.init.normal_(adaption.gate, std=0.1)
        extract_adapter(model).save(tmp_path / f"{seed}.safetensors")
    model.remove_adapter()
    prepack_weights(model)
    engine = Engine(model, tokenizer, slots=16, max_length=96, prefill_tokens=64)
    texts = ["The capital of France is", "Once upon a time, in a land far away,", "2 + 2 =", "Dear Sir or Madam,"]
    requests = []
    for i in range(32):
        name = [None, "0", "1", "2"][i // 4 % 4]
        prompt = tokenizer.encode(texts[i % 4] + " well," * (i // 16), bos=True, eos=False)
        requests.append(Request(prompt=prompt, adapter=name, config=config, stop=["\n\n"]))
    for seed in range(3):
        engine.adapters.register(str(seed), tmp_path / f"{seed}.safetensors")
    handles = [engine.submit(request) for request in requests]
    engine.run()
    for name in (None, "0", "1", "2"):
        model.remove_adapter()
        if name:
            apply_adapter(model, read_adapter(tmp_path / f"{name}.safetensors"))
        for request, handle in zip(requests, handles, strict=True):
            if request.adapter == name:
                (alone,) = generate(model, [request.prompt], config, eos_ids=tokenizer.eos_ids)
                text = tokenizer.continuation(request.prompt, alone)
                assert handle.choices[0].text == text.partition("\n\n")[0]
                assert handle.choices[0].ids == alone[: len(handle.choices[0].ids)]
