"""Ray Data settings that all data pipelines share."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_data_context(*, preserve_order: bool, patience_s: float = 3600) -> Iterator[None]:
    """Ray Data with small blocks, so that rows flow as soon as they are made, and quiet.

    patience_s: without a block moving for so long, as while machines are on their way, it errs; -1 is for ever.
    """
    from ray.data import DataContext

    saved = DataContext.get_current()
    context = saved.copy()
    context.execution_options.preserve_order = preserve_order
    context.target_max_block_size = 1 << 20
    context.execution_no_progress_timeout_s = patience_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    DataContext._set_current(context)
    try:
        yield
    finally:
        DataContext._set_current(saved)
