"""Full fine-tuning: every weight of the base is trained, as Alpaca was, to compare small adapters with.

There is no adapter to take off again: the trained weights take the place of the base's own, and the file holds all of
them. A base in 16 bits or less is refused, because an update is often smaller than the step between two neighbouring
numbers of such a format and would be lost; there are no master weights in a higher precision.

Weight decay pulls to 0 here, not to the base as it does for the other methods.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import Self

from adapter.errors import AdapterError
from adapter.methods.base import AdapterMethod

if TYPE_CHECKING:
    from adapter.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterMethod):
    """Full fine-tuning, which has no settings."""

    @property
    def method(self) -> str:
        """`full`."""
        return "full"

    @property
    def n_layers(self) -> None:
        """None: all layers are trained."""
        return None

    @property
    def trains_base(self) -> bool:
        """True."""
        return True

    @property
    def usual_lr(self) -> float:
        """Alpaca's 2e-5 at 128 records."""
        return 4e-5

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        model.requires_grad_(True)

    def check_precision(self, precision: str) -> None:
        """See `AdapterMethod.check_precision`: only float32 is precise enough to be trained."""
        if precision != "fp32":
            raise AdapterError(
                f"full fine-tuning needs a base in fp32, this one is held in {precision}, in which small updates of a "
                "weight are rounded away: hold the base in fp32, or take another method"
            )

    def on_top(self, n_layers: int) -> Self:
        """See `AdapterMethod.on_top`: all layers are always trained."""
        return self

    def describe(self) -> str:
        """See `AdapterMethod.describe`."""
        return "all weights"
