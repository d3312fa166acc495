"""What tests share: tiny and trained bases, records, generated data sets, pretrained models, one Ray cluster."""

import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch

from tests import real_models, sample_data

FREED_S = 60
"""How long Ray may take to free what a test used: its Train looks for groups that nobody owns now and then."""

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "mat",
    "hill",
    "house",
    "red",
    "big",
    "seven",
]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Makes the tests independent of terminal and cores, here and in all processes that they start.

    Tiny products gain nothing from a second thread, and threads that wait for one another on busy cores are slow.
    """
    if config.pluginmanager.has_plugin("terminalreporter"):  # the processes of pytest-xdist have none
        writer = config.get_terminal_writer()
        writer.fullwidth = writer.fullwidth  # pytest's own lines keep the width of the terminal
    os.environ |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA in Hugging Face's format with a SentencePiece tokenizer of its own."""
    sentences = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(200)]
    sentences += ["Below is an instruction that describes a task, paired with an input. ### Response: Write"]
    return make_base(tmp_path_factory.mktemp("tiny_base"), sentences)


def make_base(folder: Path, sentences: list[str]) -> Path:
    """`tiny_base` with the pieces of other sentences."""
    from adapter.base.checkpoint import save_decoder
    from adapter.decoder import Decoder, RMSNorm
    from adapter.decoder_config import DecoderConfig

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=97, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    torch.manual_seed(0)
    llama = Decoder(
        DecoderConfig(
            dim=24, n_layers=3, n_heads=6, n_kv_heads=3, hidden_dim=41, vocab_size=97, max_seq_len=1024, norm_eps=1e-5
        )
    )
    for module in llama.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    save_decoder(llama, folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 instruction records, with and without input, in JSONL."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    draw = random.Random(7)
    rows = []
    for i in range(101):
        words = draw.choices(WORDS, k=draw.randint(1, 9))
        rows.append({"instruction": f"{words[0]} {i}", "input": " ".join(words[1:4]), "output": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def trained_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA in Meta's format that was really trained."""
    return sample_data.train_llama(tmp_path_factory.mktemp("trained_llama"))


@pytest.fixture(scope="session")
def scienceqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 test problems, 24 with images, in ScienceQA's layout."""
    return sample_data.write_scienceqa(tmp_path_factory.mktemp("scienceqa"))


@pytest.fixture(scope="session")
def caltech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes in Caltech101's layout with a split file, and sentences for them."""
    return sample_data.write_caltech(tmp_path_factory.mktemp("caltech"))


def pretrained(make: Callable[[], Path]) -> Path:
    """The files of a pretrained model, fetched on first use; the test is skipped where that is impossible."""
    try:
        return make()
    except real_models.ModelUnavailableError as error:
        pytest.skip(f"{error} (make test-models fetches it)")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct."""
    return pretrained(real_models.smollm2)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return pretrained(real_models.smollm2_gguf)


@pytest.fixture(scope="session")
def efficientnet_lite0() -> Path:
    """The weights of an ImageNet encoder, for timm's `tf_efficientnet_lite0`."""
    return pretrained(real_models.efficientnet_lite0)


@pytest.fixture(scope="session")
def mistral_tokenizer() -> Path:
    """A real SentencePiece tokenizer of 32,000 pieces."""
    return pretrained(real_models.mistral_tokenizer)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on an S3 server of this machine, which the usual environment variables name."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import s3fs

    s3fs.S3FileSystem().mkdir("test")
    yield "s3://test"
    server.stop()


@pytest.fixture(scope="session")
def cluster(s3: str) -> Iterator[None]:
    """One Ray cluster for all tests that need one; its workers know the S3 server."""
    import ray

    from rayjobs.cluster.ray_init import connect

    connect()
    yield
    ray.shutdown()


@pytest.fixture
def busy_cluster(cluster: None) -> Iterator[None]:
    """The tests' cluster while another job holds all CPUs but one."""
    import ray

    @ray.remote
    class Other:
        def ready(self) -> None: ...

    other = Other.options(num_cpus=ray.cluster_resources()["CPU"] - 1).remote()
    ray.get(other.ready.remote())
    yield
    ray.kill(other)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail a file whose tests leave processors of the tests' cluster taken: those after it would wait for ever."""
    yield
    if "ray" not in sys.modules:
        return
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + FREED_S
    while ray.is_initialized() and (
        left := round(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0), 3)
    ):
        if time.monotonic() > deadline:
            groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
            alive = [one["ActorClassName"] for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
            pytest.fail(f"{left} processors are still taken after {FREED_S} s; actors: {alive}; groups: {groups}")
        time.sleep(0.1)
