"""Explain a cache and check the data that it was made of.

    contributions     what p_ZS and each key add to each logit of an image, exactly
    label_errors      training images whose own class is outvoted when their own keys are left out
    near_duplicates   pairs of images that look alike, within and across splits
    confusions        classes that are taken for each other, and the keys that pull
    next_labels       images of an unlabelled set that are worth labelling next

Everything works on features: nothing here encodes an image or reads a file.
"""

from cafo.inspection.confusions import Confusion, find_confusions
from cafo.inspection.contributions import (
    Contributions,
    Explanation,
    Vote,
    contributions_of_cache,
    decompose,
    explain,
    sentence_contributions,
)
from cafo.inspection.label_errors import LabelCheck, check_labels, check_training_labels
from cafo.inspection.near_duplicates import NearDuplicates, Pair, find_near_duplicates
from cafo.inspection.next_labels import NextLabel, choose_next_labels

__all__ = [
    "Confusion",
    "Contributions",
    "Explanation",
    "LabelCheck",
    "NearDuplicates",
    "NextLabel",
    "Pair",
    "Vote",
    "check_labels",
    "check_training_labels",
    "choose_next_labels",
    "contributions_of_cache",
    "decompose",
    "explain",
    "find_confusions",
    "find_near_duplicates",
    "sentence_contributions",
]
