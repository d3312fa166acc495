"""Continuous batching of requests, each with an adapter of its own, over one frozen decoder.

| module | what lives there |
|---|---|
| `engine` | queue, slots and steps |
| `request` | what is asked and what is answered |
| `sequence` | one continuation on its way |
| `sampling` | the choice of the next token |
| `text_stream` | text out of tokens, while they come |
| `adapters` | adapters by name, and those held in memory |
| `row_prompts` | the adapters' part of attention |
| `row_parts` | the adapters' parts inside linear layers and norms |
| `worker` | an engine that runs in a thread of its own |
| `prepacking` | weights laid out for generation on a CPU |

The KV cache and the attention to it are `adapter.kv_cache`.
"""
