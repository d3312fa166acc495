"""Limits of the compiled kernels that torch and oneDNN keep on a CPU: one for every number of tokens in a step.

The numbers vary from step to step. By default each of the two caches holds 1,024 kernels, which for a base of 135 M
parameters is 3 MiB for every number of tokens that has occurred, and looks like a leak. Kernels that are made again
cost a few percent of the time of short requests.
"""

from rayjobs.cluster.environment import set_unless_given

KEPT = "32"
"""Kernels in each cache; one step needs five, whatever its number of tokens."""
_VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def limit_kernel_caches() -> None:
    """Limit the caches of this process, unless its environment does. Call it before the first product on a CPU."""
    set_unless_given(dict.fromkeys(_VARIABLES, KEPT))
