"""Ray Data settings that all data pipelines share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rayjobs.console import verbose


@contextmanager
def ray_data_context(*, preserve_order: bool, no_progress_timeout_s: float = 3600) -> Iterator[None]:
    """Run the pipelines of a block with small data blocks, without progress bars, and with user errors as they are.

    Blocks of 1 MiB pass rows on as soon as they are made. Ray Data's log is silent, except with --verbose: a handler
    that keeps the record of an error, as pytest's does, would keep the actors of the pipeline that failed, and their
    CPUs.

    preserve_order: yield rows in the order of the input. no_progress_timeout_s: raise an error if no block was finished
    for so long, for instance because no node has room; -1 waits forever.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = preserve_order
    context.target_max_block_size = 1 << 20
    context.execution_no_progress_timeout_s = no_progress_timeout_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's UserCodeException loses its cause when it is pickled.
    logger = logging.getLogger("ray.data")
    level = logger.level
    if not verbose():  # RAY_DATA_LOG_LEVEL comes too late where Ray Data was imported before
        logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
