"""CaFo's rivals: few-shot methods on the features that CaFo's cache is made of, under one protocol.

Each method is one file that opens with its paper and equations: a frozen dataclass of the authors' constants that
follows `Method` of `cafo.methods.base`. `cafo.methods.choice` fits any of them and chooses its hyperparameters. A new
method is one file, one line below, and one test against a naive version of its equations.
"""

from collections.abc import Mapping
from types import MappingProxyType

from cafo.errors import CafoError
from cafo.methods.ape import Ape
from cafo.methods.ape_t import ApeT
from cafo.methods.base import Method
from cafo.methods.gda import Gda
from cafo.methods.linear_probe import LinearProbe
from cafo.methods.lp_plus_plus import LpPlusPlus
from cafo.methods.nearest_mean import NearestMean
from cafo.methods.prolip import ProLip
from cafo.methods.timo import Timo
from cafo.methods.tip_adapter import TipAdapter, TipAdapterF

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "nearest class mean": NearestMean(),
        "linear probe": LinearProbe(),
        "Tip-Adapter": TipAdapter(),
        "Tip-Adapter-F": TipAdapterF(),
        "APE": Ape(),
        "APE-T": ApeT(),
        "GDA": Gda(),
        "LP++": LpPlusPlus(),
        "TIMO": Timo(),
        "TIMO-S": Timo(searched=True),
        "ProLIP": ProLip(),
        "RLA": ProLip(on_embeddings=True),
    }
)
"""Name → method with its authors' constants."""


def find_method(name: str) -> Method:
    """Return a method by its name, whatever its case. Raises CafoError for an unknown name."""
    for known, method in METHODS.items():
        if known.casefold() == name.casefold():
            return method
    raise CafoError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
