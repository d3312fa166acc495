"""Names of the ways to choose α, β and the ensemble, as settings spell them. This module imports no PyTorch."""

from typing import Literal

Select = Literal["val", "crossfit", "leave_one_out", "prior"]
"""The images that a choice is made on (`cafo.selection`)."""

Rule = Literal["near_best", "highest"]
"""The rule by which α, β and the ensemble are chosen by their accuracies: `highest` takes the highest accuracy, and
the smallest α on ties; `near_best` takes, of those within one standard error of the highest, the one with the lowest
loss."""
