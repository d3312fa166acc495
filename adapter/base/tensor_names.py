"""Other formats' names of a decoder's tensors. Its own names are Meta's, or like them where Meta has none."""

from collections.abc import Mapping

_HF_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_HF_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_HF_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_GGUF_TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_GGUF_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_post_norm": "post_ffw_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def hf_key(name: str, *, post_norms: bool = False) -> str:
    """Hugging Face's key of the decoder's parameter `name`.

    post_norms: the decoder also normalises the outputs of its layers' parts, as Gemma 2 does, where the name that
    other families give to the norm before the feed-forward layer means the one after attention.
    """
    return _key(name, _HF_TOP, "model.layers", {**_HF_BLOCK, **_HF_POST_NORMS} if post_norms else _HF_BLOCK)


def gguf_key(name: str) -> str:
    """llama.cpp's name of the decoder's parameter `name`."""
    return _key(name, _GGUF_TOP, "blk", _GGUF_BLOCK)


def _key(name: str, top: Mapping[str, str], layers: str, block: Mapping[str, str]) -> str:
    """The name in a format that calls the modules outside its layers `top`, and those of a layer `block`."""
    module, _, parameter = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    return f"{layers}.{layer}.{block[module]}.{parameter}"
