"""Held-out loss of a model over many records, by Ray Data."""

import pyarrow as pa
import torch

from rayjobs.data.loader import collate
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer

LOSSES = pa.schema([("id", pa.int64()), ("loss", pa.float64()), ("labels", pa.int64())])


class Scorer:
    """An actor that holds the model and sums each record's loss over its labels."""

    def __init__(
        self, base: BaseModelConfig, adapter: str | None, conditioning: ImageConditioning | None, stored: bool, device: str
    ) -> None:
        self.model = base.load(adapter, device, encoder=conditioning and conditioning.encoder.identity).model
        self.featurizer = ImageFeaturizer(None if conditioning is None or stored else conditioning.encoder, device)
        self.device = device

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        rows: dict[str, list[float]] = {"id": [], "loss": [], "labels": []}
        for micro in map(collate, table.to_pylist()):
            labels = micro.labels.to(self.device)
            images = self.featurizer.images(micro.images)
            seen = None if images is None else (images[0].to(self.device), images[1].to(self.device))
            hidden = self.model.hidden(micro.tokens.to(self.device), images=seen)
            for i, id in enumerate(micro.ids):
                rows["id"].append(id)
                rows["loss"].append(self.model.output(hidden[i : i + 1], labels[i : i + 1]).item())
                rows["labels"].append(int((micro.labels[i] >= 0).sum()))
        return pa.table(rows, LOSSES)
