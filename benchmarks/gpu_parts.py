"""The parts of `benchmarks.gpu` that do not train: the machine itself, generation, an image encoder, CaFo's search."""

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from adapter.generate import generate
from benchmarks.gpu_setup import Figures, Sizes, add_adapter, random_decoder, timed
from cafo.encoder_spec import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""Precisions of the encoder."""


def machine(sizes: Sizes, device: str) -> Figures:
    """Measure the peak of bf16 matrix products, and the memory's bandwidth in copying and in reading."""
    rates = []
    for side in sizes.product:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        rates.append(2 * side**3 / timed(lambda a=a, b=b: a @ b, device, rounds=20))
    source = torch.ones(sizes.copied_bytes // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    vector = torch.ones(4096 if len(source) >= 1 << 24 else 64, device=device, dtype=torch.bfloat16)
    matrix = source.view(-1, len(vector))
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "flops_per_s": max(rates),
        "copied_bytes_per_s": 2 * source.nbytes / timed(lambda: target.copy_(source), device),
        "read_bytes_per_s": source.nbytes / timed(lambda: matrix @ vector, device),
    }


@torch.inference_mode()
def decode(sizes: Sizes, device: str) -> Figures:
    """Measure greedy generation of the base with an adapter: tokens per second beyond the first, by batch size."""
    model = random_decoder(sizes, "bf16", device)
    add_adapter(model, sizes)
    embedding = 0 if model.config.tied_head else model.tok_embeddings.weight.nbytes
    figures: Figures = {"bytes_per_step": sum(parameter.nbytes for parameter in model.parameters()) - embedding}
    rng = torch.Generator().manual_seed(0)
    for batch in sizes.decoding:
        lengths = torch.linspace(8, 71, batch + 2)[1:-1].round().int().tolist()
        prompts = [torch.randint(3, sizes.decoder.vocab_size, (n,), generator=rng).tolist() for n in lengths]

        def run(n: int, prompts: list[list[int]] = prompts) -> None:
            generate(model, prompts, eos_ids=(), temperature=0, max_new_tokens=n)

        one, many = (timed(lambda n=n: run(n), device, rounds=3) for n in (1, 1 + sizes.new_tokens))
        figures[f"batch_{batch}"] = {"tokens_per_s": batch * sizes.new_tokens / (many - one), "first_token_s": one}
    return figures


def encode(sizes: Sizes, device: str) -> Figures:
    """Measure a CLIP's image encoder on images that lie on the device, in float32 and bf16."""
    from cafo.encoders import load_encoder

    figures: Figures = {"encoder": sizes.encoder.name, "batch": sizes.images}
    for precision in PRECISIONS:
        encoder = load_encoder(replace(sizes.encoder, precision=precision), device)
        side = encoder.preprocess.size
        images = torch.randn(sizes.images, 3, side, side, device=device)
        with FlopCounterMode(display=False) as counted:
            encoder.encode_image(images)
        seconds = timed(lambda: encoder.encode_image(images), device)  # noqa: B023
        figures[precision] = {"images_per_s": len(images) / seconds, "flops_per_s": counted.get_total_flops() / seconds}
    return figures


def search(sizes: Sizes, device: str) -> Figures:
    """Measure the exact choice of α and β on validation images, against the products of their features alone."""
    from benchmarks.cafo_search import as_held_out, make
    from cafo.search import search as choose
    from cafo.search_grid import BetaGrid

    keys, features, classifier, key_labels, labels = make(sizes.search, seed=0)
    keys, features = ({name: t.to(device) for name, t in tensors.items()} for tensors in (keys, features))
    images = as_held_out(keys, features, classifier.to(device), key_labels.to(device), labels.to(device))

    def products() -> None:
        for block in images.rows.split(256):
            for name, source in features.items():
                source[block] @ keys[name].T
            features["clip"][block] @ images.classifier

    chosen = choose(images, grid=BetaGrid())
    return {
        "images": len(labels),
        "keys": len(key_labels),
        "products_s": timed(products, device, rounds=3),
        "search_s": timed(lambda: choose(images, grid=BetaGrid()), device, rounds=1),
        "accuracy": chosen.accuracy,
    }
