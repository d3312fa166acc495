"""CaFo: prompt, generate, then cache (arXiv 2303.02151). PyTorch and open_clip, no cluster.

items, datasets      labelled images and their splits
fewshot              the K-shot choice
image_trees          folders of images as data sets
paper_datasets       the paper's own data sets
encoders, images     images → unit features
prompt               sentences → CLIP's zero-shot classifier W
generate             generated images, the best K' by CLIP
cache, ensemble      keys and values → p_ZS + α · term (eq. 3-9)
key_training         the training of the keys
search               α, β and the ensemble's weights, the best on given images
cross_fit            training images that are held out, where there are no validation images
selection            all of it: train the keys and choose, on validation images or without; `estimate` of the accuracy
methods              other few-shot methods on the same features: Tip-Adapter, APE, GDA, LP++, TIMO, ProLIP …
model                all of it as one object: fit on a folder, predict images

The public names are imported on first use, so `import cafo` alone loads neither PyTorch nor open_clip.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cafo.datasets import load_split
    from cafo.encoder_spec import EncoderSpec
    from cafo.image_trees import load_tree
    from cafo.model import CaFo, FitConfig
    from cafo.paper_datasets import load_dataset

__all__ = ["CaFo", "EncoderSpec", "FitConfig", "load_dataset", "load_split", "load_tree"]

_MODULES = {"CaFo": "model", "EncoderSpec": "encoder_spec", "FitConfig": "model", "load_dataset": "paper_datasets"}
_MODULES |= {"load_split": "datasets", "load_tree": "image_trees"}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of the package that this library is installed with
        return import_module("importlib.metadata").version("rayjobs")
    if name in __all__:
        return getattr(import_module(f"cafo.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'cafo' has no attribute {name!r}")
