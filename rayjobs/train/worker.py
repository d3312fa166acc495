"""The training loop that every Ray Train worker runs."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from adapter.errors import AdapterError
from rayjobs.cluster.device import peak_memory_bytes
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.data.loader import DataRead, MicroBatch, load_micro_batches
from rayjobs.errors import NonFiniteLossError, UserError
from rayjobs.models.image_conditioning import ImageFeaturizer
from rayjobs.train.callbacks import TRAINING
from rayjobs.train.checkpoint import Resumable, TrainingCheckpoint, copy_finite, find_resumable
from rayjobs.train.checkpoint_writer import CheckpointWriter
from rayjobs.train.engine import Engine, adapted_model
from rayjobs.train.metric_rows import MetricRows
from rayjobs.train.start_times import StartTimes
from rayjobs.train.train_job import TrainJob
from rayjobs.train.validation import measure_validation

REPORT_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one optimizer step: a row of metrics.jsonl."""

    step: int
    epoch: float
    loss: float
    """Mean over the global batch's labelled tokens."""
    lr: float
    tokens_per_s: int
    """Over all workers, padding left out."""
    busy: float
    """Percentage of the step's time, averaged over workers, that was not spent waiting for data."""
    workers: int


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """The value that a worker returns to the driver."""

    error: UserError | AdapterError | None = None


class Due(NamedTuple):
    """Actions that all workers take after a step."""

    report: bool
    checkpoint: bool


class AgreedError(Exception):
    """Carries a user error that all workers raise at the same point, so that none waits for another.

    Such an error is returned to the driver. Ray Train would restart the workers `max_failures` times for a raised one.
    """

    def __init__(self, error: UserError | AdapterError) -> None:
        super().__init__(str(error))
        self.error = error


def train_worker(arguments: dict[str, Any]) -> WorkerResult:
    """Train as one of the workers. `arguments` are those of `TrainingLoop`."""
    loop = TrainingLoop(**arguments)
    try:
        loop.run()
        return WorkerResult()
    except AgreedError as agreed:
        return WorkerResult(error=agreed.error)
    except Exception:
        if loop.preemption is not None:  # a lost peer: raised before Ray sees its node go, it would count as a failure
            deadline_s = (loop.preemption.deadline_ms or 0) / 1000
            time.sleep(min(max(deadline_s + 2 - time.time(), 10.0), 40.0))
        raise


class TrainingLoop:
    """One worker's part of a training run.

    storage: Train's folder, a path or URI. threads: PyTorch's threads on a CPU; None shares the node's cores among its
    workers.
    """

    def __init__(self, job: TrainJob, storage: str, threads: int | None) -> None:
        self.job, self.storage = job, storage
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.sampler = job.sampler("train")
        self.step, self.last_step = 0, job.last_step
        self.rows = MetricRows()
        self.read = DataRead()
        self.passed_over: list[str] = []
        self.writer = CheckpointWriter(storage)
        self.preemption: ray.train.PreemptionInfo | None = None

    def run(self) -> None:
        """Train to the last step, resuming from the newest checkpoint."""
        with self.writer:
            ray.train.report({"doing": "loading the model"})
            times = StartTimes()
            self.check_folders()
            self.setup()
            unreported = self.resume()
            times.end("loading the model")
            validates = self.step == 0 and self.job.validates_after(0)
            doing = "validating before the first step" if validates else TRAINING
            send({"doing": doing, "resumed_at": self.step, "passed_over": self.passed_over}, unreported)
            if validates:
                self.log_validation()
                times.end("validating")
            self.train(times)

    def train(self, times: StartTimes) -> None:
        """Make the steps that are left. times: the phases before, to which that of the first step is added."""
        self.step_began = self.reported = self.saved = time.monotonic()
        steps = range(self.step, self.last_step)
        for micro_batches in group_by_step(load_micro_batches(self.sampler, self.rank, self.world, steps)):
            due = self.train_step(micro_batches)
            if self.step == steps.start + 1:
                times.end("the first step")
                ray.train.report({"started": times.seconds})
            if self.job.validates_after(self.step):
                self.log_validation()
            if self.step == self.job.total_steps:
                self.log_workers(self.step - steps.start)
            self.end_step(due)
            self.step_began = time.monotonic()
        self.report(wait=True)

    def check_folders(self) -> None:
        """Raise the StorageError of a node that does not see the run's folder or the token store."""
        error = None
        try:
            assert_shared_storage(os.path.dirname(self.storage), self.job.store.folder)
        except UserError as own:
            error = own
        for agreed in filter(None, gather_objects(error)):
            raise AgreedError(agreed)

    def setup(self) -> None:
        """Build the model, the engine and the image encoder. All workers find the same errors in the same files."""
        job = self.job
        try:
            model = adapted_model(
                job.base, job.adapter, dtype=job.dtype, zero=job.zero, seed=job.train.seed, device=self.device
            )
        except AdapterError as error:
            raise AgreedError(error) from error
        model.checkpoint_activations = job.train.checkpoint_activations
        self.engine = Engine(model, job.zero, job.optimizer)
        self.featurizer = ImageFeaturizer(job.encoder, self.device)

    def resume(self) -> Checkpoint | None:
        """Load the newest checkpoint. Rank 0 chooses and reads it, so that all workers resume from the same step.

        Returns, on rank 0, its place if Ray Train was not told of it.
        """
        found: Resumable | None = None
        newest: list[TrainingCheckpoint | UserError | None] = [None]
        if self.rank == 0:
            try:
                found = find_resumable(self.storage, self.passed_over.append)
                newest = [found and found.content]
            except UserError as error:
                newest = [error]
        dist.broadcast_object_list(newest, device=self.device)
        checkpoint = newest[0]
        if isinstance(checkpoint, UserError):
            raise AgreedError(checkpoint)
        if checkpoint is None:
            return None
        try:
            self.engine.load_state(checkpoint.state)
        except UserError as error:  # the state of another adapter, as every worker finds before any communication
            raise AgreedError(error) from error
        self.step = checkpoint.step
        self.rows.resume(checkpoint.rows, checkpoint.step)
        return found and found.unreported

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Due:
        """Make one optimizer step and log it; return what is due after it.

        Rank 0's clock decides, and the sum of the losses, which all workers wait for anyway, carries its decision.

        Raises AgreedError with a NonFiniteLossError, before the weights are changed, if the loss is infinite or NaN.
        """
        waited = time.monotonic() - self.step_began
        lr = self.job.train.learning_rate(self.step, self.sampler.steps_per_epoch, self.job.peak_lr)
        losses = []
        for micro in micro_batches:
            images = self.featurizer.images(micro.images)
            loss = self.engine.loss(micro.tokens, micro.labels, images) / micro.step_labels
            self.engine.backward(loss)
            losses.append(loss.detach())
            self.read += micro.read
        local_loss = torch.stack(losses).sum().item()  # the step's only wait for the device
        due = self.due_after(self.step + 1) if self.rank == 0 else Due(report=False, checkpoint=False)
        tokens = sum(micro.n_tokens for micro in micro_batches)
        idle = waited / (time.monotonic() - self.step_began)
        pictured = [image is not None for micro in micro_batches for image in micro.images]
        kinds = not all(pictured), any(pictured)
        local = [local_loss, tokens, idle, *kinds, *due]
        sums = torch.tensor(local, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(sums)
        loss, all_tokens, all_idle, text, images, *flags = sums.tolist()
        if not math.isfinite(loss):
            self.stop_at_nonfinite_loss(loss, lr, micro_batches, losses)
        self.engine.step(lr, text=bool(text), images=bool(images))
        self.step += 1
        metrics = StepMetrics(
            step=self.step,
            epoch=round(self.step / self.sampler.steps_per_epoch, 4),
            loss=loss,
            lr=lr,
            tokens_per_s=round(all_tokens / (time.monotonic() - self.step_began)),
            busy=round(100 * (1 - all_idle / self.world), 1),
            workers=self.world,
        )
        self.rows.add(asdict(metrics))
        return Due(*map(bool, flags))

    def due_after(self, step: int) -> Due:
        """Return what is due after a step, by rank 0's clock. A checkpoint by time waits until the last is written."""
        now, train = time.monotonic(), self.job.train
        by_time = train.checkpoint_every_s is not None and now - self.saved >= train.checkpoint_every_s
        by_step = train.checkpoint_every_steps is not None and step % train.checkpoint_every_steps == 0
        return Due(
            report=self.writer.is_done or now - self.reported > REPORT_EVERY_S,
            checkpoint=by_step or (by_time and self.writer.is_idle) or step == self.last_step,
        )

    def stop_at_nonfinite_loss(
        self, loss: float, lr: float, micro_batches: Sequence[MicroBatch], losses: Sequence[torch.Tensor]
    ) -> NoReturn:
        """Report the steps before this one, and raise AgreedError with a NonFiniteLossError that names the records."""
        pairs = zip(micro_batches, losses, strict=True)
        local_ids = [id for micro, part in pairs if not part.isfinite() for id in micro.ids]
        ids = sorted(id for part in gather_objects(local_ids) for id in part)
        self.report(wait=True)
        raise AgreedError(
            NonFiniteLossError(
                f"the loss became {loss} at step {self.step + 1} (lr {lr:.3g}) on records with ids {ids}; the weights "
                "were not changed. With a lower optimizer.base_lr, or with optimizer.clip_norm, the same command goes "
                "on from the last checkpoint. Records that are corrected make another run, with another run.name"
            )
        )

    def log_validation(self) -> None:
        measured = measure_validation(self.engine, self.featurizer, self.job, self.rank, self.world)
        self.rows.add({"step": self.step, **measured})

    def log_workers(self, steps: int) -> None:
        """Log what each worker has read for its `steps` since it started, and the most memory that one of them held."""
        all_own = gather_objects((self.read, peak_memory_bytes(self.device.type)))
        workers = [{"worker": rank, "steps": steps, **asdict(read)} for rank, (read, _) in enumerate(all_own)]
        peak = max((held for _, held in all_own if held), default=None)
        self.rows.add({"step": self.step, "workers": self.world, "data_read": workers, "peak_memory_bytes": peak})

    def end_step(self, due: Due) -> None:
        """Report metrics and begin a checkpoint, where they are due. All workers do it after the same steps.

        From the notice that a node will be taken away until it is, every step is saved.
        """
        if due.report and self.preemption is None:
            self.notice_preemption()
        saves = due.checkpoint or self.preemption is not None
        if saves or due.report:
            self.report(wait=saves)
        if saves:
            self.begin_checkpoint()

    def notice_preemption(self) -> None:
        """Note and report whether a node of this run is about to be taken away.

        All workers get the same answer, and wait for each other: hence this is asked with reports, not at every step.
        """
        self.preemption = ray.train.get_preemption_info()
        if self.preemption is not None:
            nodes, deadline_ms = self.preemption.preempted_node_ids, self.preemption.deadline_ms
            ray.train.report({"preemption": {"nodes": len(nodes), "deadline_ms": deadline_ms}})

    def report(self, *, wait: bool) -> None:
        """Report the metrics so far, and the last checkpoint if it has been written since.

        wait: wait for one that is being written. Raises OSError on rank 0 if it could not be written.
        """
        written = self.writer.take(wait=wait)
        saved = {"saved_step": written.step} if written else {}
        send({"rows": self.rows.unreported, **saved}, written and written.place)
        self.rows.forget_reported()
        self.reported = time.monotonic()

    def begin_checkpoint(self) -> None:
        """Copy the training state, which takes all workers, and let rank 0 write it while the next steps are made."""
        try:
            state = copy_finite(self.engine.tensors(), self.step, keep=self.rank == 0)
        except NonFiniteLossError as error:
            raise AgreedError(error) from error
        if state:
            self.writer.start(TrainingCheckpoint(state, self.step, self.rows.for_checkpoint(self.step)))
        self.saved = time.monotonic()


def send(metrics: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Report to Ray Train's controller, with a checkpoint that is in Train's folder already."""
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def group_by_step(micro_batches: Iterator[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of one optimizer step at a time."""
    step = []
    for micro in micro_batches:
        step.append(micro)
        if micro.last:
            yield step
            step = []


def gather_objects(local: Any) -> list[Any]:
    """Return every worker's object, by rank."""
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, local)
    return objects
