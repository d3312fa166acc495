"""Hugging Face's names of a decoder's tensors. The decoder's own names are Meta's, or like them where Meta has none."""

_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def hf_key(name: str, *, post_norms: bool = False) -> str:
    """Hugging Face's key of the decoder's parameter `name`.

    post_norms: the decoder also normalises the outputs of its layers' parts, as Gemma 2 does, where the name that
    other families give to the norm before the feed-forward layer means the one after attention.
    """
    module, _, parameter = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    names = {**_BLOCK, **_POST_NORMS} if post_norms else _BLOCK
    return f"model.layers.{layer}.{names[module]}.{parameter}"
