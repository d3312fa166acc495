"""The files that are mutated, and the tests that should find their mutants, the quickest first."""

LOADED_FIRST = ("hypothesis", "sentencepiece", "tokenizers", "torch")
"""Libraries that take long to import: once, and not once for each mutant of what runs at import."""

TARGETS = {
    "adapter/attention.py": ("tests/adapter/test_attention.py",),
    "adapter/loss.py": ("tests/adapter/test_loss.py",),
    "adapter/batching.py": ("tests/adapter/test_batching.py",),
    "adapter/micro_batches.py": ("tests/adapter/test_micro_batches.py",),
    "adapter/packing.py": ("tests/adapter/test_packing.py",),
    "adapter/engine/sampling.py": ("tests/adapter/engine/test_sampling.py",),
    "rayjobs/data/sampler.py": ("tests/rayjobs/data/test_sampler.py",),
    "cafo/cache.py": ("tests/cafo/test_cache.py",),
    "cafo/ensemble.py": ("tests/cafo/test_ensemble.py",),
    "cafo/alpha_intervals.py": ("tests/cafo/test_alpha_intervals.py",),
    "cafo/search_grid.py": ("tests/cafo/test_search_grid.py",),
    "cafo/search.py": ("tests/cafo/test_search.py", "tests/cafo/test_reduced.py"),
    "cafo/near_best.py": ("tests/cafo/test_near_best.py",),
    "cafo/selection.py": ("tests/cafo/test_selection.py",),
    "cafo/reduced.py": ("tests/cafo/test_reduced.py", "tests/cafo/test_search_exactness.py"),
    "cafo/beta_nodes.py": ("tests/cafo/test_beta_nodes.py",),
    "cafo/competing_classes.py": ("tests/cafo/test_competing_classes.py",),
    "rayjobs/tune/selection.py": ("tests/rayjobs/tune/test_selection.py", "tests/rayjobs/tune/test_search_space.py"),
}
