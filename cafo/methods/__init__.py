"""CaFo's rivals: few-shot methods on the features that CaFo's cache is made of, under one protocol.

Each method is one file that opens with its paper and equations: a frozen dataclass of the authors' constants that
follows `Method` of `cafo.methods.base`. `cafo.methods.choice` fits any of them and chooses its hyperparameters. A new
method is one file, one line below, and one test against a naive version of its equations.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

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


def full_name(name: str) -> str:
    """Return a method's name as `METHODS` has it, whatever its case. Raises CafoError for an unknown name."""
    for known in METHODS:
        if known.casefold() == name.casefold():
            return known
    raise CafoError(f"there is no method {name!r}; there are {', '.join(METHODS)}")


def find_method(name: str, constants: Mapping[str, Any] | None = None) -> Method:
    """Return a method by its name, whatever its case.

    Args:
        name: the name.
        constants: those of the method's constants that are changed, as a config has them, such as
            `{"grid": {"beta_steps": 50}}`.

    Raises:
        CafoError: an unknown name, or a constant that the method does not have or that cannot have this value.
    """
    method = METHODS[full_name(name)]
    if not constants:
        return method
    values = _merge(method.constants, constants, full_name(name))
    try:
        changed: Method = TypeAdapter(type(method)).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CafoError(f"{full_name(name)}: {where}: {first['msg']}, got {first['input']!r}") from error
    if not all(stage.settings and stage.alphas for stage in changed.stages):
        raise CafoError(
            f"{full_name(name)}: {dict(constants)} leaves no value to try; give each grid at least one step"
        )
    return changed


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values with some changed, at any depth. Raises CafoError for a name that is not there."""
    merged = dict(values)
    for name, value in changes.items():
        if name not in values:
            raise CafoError(f"{where} has no constant {name!r}; it has {', '.join(values) or 'none'}")
        inner = values[name]
        merged[name] = (
            _merge(inner, value, f"{where}: {name}") if isinstance(inner, dict) and isinstance(value, dict) else value
        )
    return merged
