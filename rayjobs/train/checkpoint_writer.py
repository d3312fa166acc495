"""Write training checkpoints in the background, one at a time, while the training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from rayjobs.train.checkpoint import TrainingCheckpoint, WrittenCheckpoint, write_checkpoint


class CheckpointWriter:
    """A thread that writes checkpoints. As a context manager it ends what is being written when the block ends.

    A checkpoint that `start` was given is returned once by `take`, which also raises the error that kept it from being
    written. Only then may the next one start.
    """

    def __init__(self, storage: str) -> None:
        """storage: Ray Train's folder, a path or URI."""
        self.storage = storage
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[WrittenCheckpoint] | None = None

    def start(self, content: TrainingCheckpoint) -> None:
        """Begin to write a checkpoint. Its tensors must be copies that nothing changes any more."""
        assert self._written is None, "the checkpoint before has not been taken"
        self._written = self._thread.submit(write_checkpoint, self.storage, content)

    @property
    def is_idle(self) -> bool:
        """True if no checkpoint is being written or waits to be taken."""
        return self._written is None

    @property
    def is_done(self) -> bool:
        """True if a checkpoint has been written, or could not be, and waits to be taken."""
        return self._written is not None and self._written.done()

    def take(self, *, wait: bool) -> WrittenCheckpoint | None:
        """Return the checkpoint that was written last, if it has not been returned before.

        wait: wait for one that is being written; otherwise None is returned until it is there. Raises OSError if it
        could not be written.
        """
        if self._written is None or not (wait or self._written.done()):
            return None
        written, self._written = self._written, None
        return written.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.take(wait=True)
