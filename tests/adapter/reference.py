"""The equations, token by token and head by head, in float64 loops that are too slow to be wrong in a clever way.

Nothing here is shared with `adapter`, but for the configs that hold the numbers.
"""

import math

import torch
from torch import Tensor

from adapter.adaption import AdaptionConfig
from adapter.decoder_config import DecoderConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (C,) over its root mean square."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return torch.stack([value / math.sqrt(mean_square + eps) * w for value, w in zip(x, weight, strict=True)])


def frequency(pair: int, config: DecoderConfig) -> float:
    """How far the rotation of a pair of coordinates goes per position, in radians."""
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    if config.rope_scaling is None:
        return plain
    scaling = config.rope_scaling
    wavelength = 2 * math.pi / plain
    if wavelength < scaling.original_length / scaling.high_freq_factor:
        return plain
    if wavelength > scaling.original_length / scaling.low_freq_factor:
        return plain / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def rope_halves(x: Tensor, position: int, config: DecoderConfig) -> Tensor:
    """x (D,) with the pairs (0, D/2), (1, D/2 + 1), ... rotated: Hugging Face's convention."""
    rotated, half = x.clone(), len(x) // 2
    for pair in range(half):
        angle = position * frequency(pair, config)
        a, b = x[pair], x[pair + half]
        rotated[pair] = a * math.cos(angle) - b * math.sin(angle)
        rotated[pair + half] = a * math.sin(angle) + b * math.cos(angle)
    return rotated


def rope_adjacent(x: Tensor, position: int, config: DecoderConfig) -> Tensor:
    """x (D,) with the pairs (0, 1), (2, 3), ... rotated: Meta's convention."""
    rotated = x.clone()
    for pair in range(len(x) // 2):
        angle = position * frequency(pair, config)
        a, b = x[2 * pair], x[2 * pair + 1]
        rotated[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        rotated[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return rotated


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (D,) over its keys: softmax(q k / sqrt(D)) v."""
    scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True))


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    gate, up = w1 @ x, w3 @ x
    return w2 @ (gate / (1 + torch.exp(-gate)) * up)


def attention(x: Tensor, layer: dict[str, Tensor], config: DecoderConfig, gate: str | None) -> Tensor:
    """Causal attention of x (T, C), plus, where gate names a convention, the gated prompt term (eq. 1-8)."""
    D, group = config.head_dim, config.n_heads // config.n_kv_heads

    def head(projection: str, index: int, state: Tensor) -> Tensor:
        return layer[f"attention.{projection}.weight"][index * D : (index + 1) * D] @ state

    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(config.n_heads):
            query = rope_halves(head("wq", h, x[t]), t, config)
            keys = [rope_halves(head("wk", h // group, x[s]), s, config) for s in range(t + 1)]
            values = [head("wv", h // group, x[s]) for s in range(t + 1)]
            out = attend(query, keys, values)
            if gate is not None:
                prompt, g = layer["attention.adaption.prompt"], float(layer["attention.adaption.gate"][h])
                prompt_keys = [head("wk", h // group, token) for token in prompt]
                prompt_values = [head("wv", h // group, token) for token in prompt]
                if gate == "prefix":
                    out = attend(query, prompt_keys + keys, prompt_values + values)
                else:
                    g = {"tanh": math.tanh(g), "identity": g, "one": 1.0}[gate]
                    out = out + g * attend(query, prompt_keys, prompt_values)
            heads.append(out)
        rows.append(layer["attention.wo.weight"] @ torch.cat(heads))
    return torch.stack(rows)


def image_token(features: Tensor, state: dict[str, Tensor], widths: tuple[int, ...]) -> Tensor:
    """An image's features (F,) → its token (C,): eq. 9, each scale brought to mean 0 and variance 1 before."""
    scaled, start = [], 0
    for width in widths:
        scale = [float(value) for value in features[start : start + width]]
        mean = sum(scale) / width
        spread = math.sqrt(sum((value - mean) ** 2 for value in scale) / width + 1e-5)
        scaled += [(value - mean) / spread for value in scale]
        start += width
    hidden = []
    for row, bias in zip(state["vision.down.weight"].double(), state["vision.down.bias"].double(), strict=True):
        x = sum(float(w) * value for w, value in zip(row, scaled, strict=True)) + float(bias)
        hidden.append(x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    up = zip(state["vision.up.weight"].double(), state["vision.up.bias"].double(), strict=True)
    return torch.stack([sum(float(w) * h for w, h in zip(row, hidden, strict=True)) + bias for row, bias in up])


def decoder(
    state: dict[str, Tensor], config: DecoderConfig, tokens: list[int], adaption: AdaptionConfig | None = None
) -> Tensor:
    """Logits (T, V) of one sequence, from a model's state dict."""
    state = {name: value.double() for name, value in state.items()}
    x = torch.stack([state["tok_embeddings.weight"][token] for token in tokens])
    for i in range(config.n_layers):
        layer = {name.removeprefix(f"layers.{i}."): w for name, w in state.items() if name.startswith(f"layers.{i}.")}
        adapted = adaption is not None and i >= config.n_layers - adaption.n_layers
        normed = torch.stack([rms_norm(row, layer["attention_norm.weight"], config.norm_eps) for row in x])
        x = x + attention(normed, layer, config, adaption.gate if adapted else None)
        ffn = [layer[f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3")]
        x = x + torch.stack([swiglu(rms_norm(row, layer["ffn_norm.weight"], config.norm_eps), *ffn) for row in x])
    final = torch.stack([rms_norm(row, state["norm.weight"], config.norm_eps) for row in x])
    return torch.stack([state["output.weight"] @ row for row in final])


def cross_entropy(logits: Tensor, labels: list[int], ignore: int) -> float:
    """Summed over one sequence: logits (T, V) at t - 1 predict labels[t]."""
    total = 0.0
    for t in range(1, len(labels)):
        if labels[t] != ignore:
            row = [float(value) for value in logits[t - 1]]
            top = max(row)
            total += top + math.log(sum(math.exp(value - top) for value in row)) - row[labels[t]]
    return total


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """The tokens that may be drawn, likeliest first, and with what probability."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    kept: dict[int, float] = {}
    for token in sorted(range(len(logits)), key=lambda token: -weights[token]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = weights[token] / sum(weights)
    return {token: p / sum(kept.values()) for token, p in kept.items()}
