"""JSON files of checkpoints, checked key by key. Of each file only the keys that its class declares are read."""

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from typing_extensions import Self

from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.json_object import read_object

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
LayerCount = Annotated[int, Field(ge=1, le=10_000)]
"""A number of layers, up to many times the most that are published: a list of them, or they themselves, can be made."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class JsonConfig(BaseModel):
    """Base class for a JSON object in a file. Every error names the file and the key."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    _file: Path = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Null counts as absent, but where it turns off what is on by default."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields.items()
        kept = {name for name, field in fields if field.default is not None and NoneType in get_args(field.annotation)}
        return {key: value for key, value in values.items() if value is not None or key in kept}

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file. Raises CheckpointError for JSON that is malformed, or a value that is missing or unusable."""
        return cls.parse(read_object(file, CheckpointError), file)

    @classmethod
    def parse(cls, values: dict[str, Any], file: Path) -> Self:
        """Check the content of a file. Raises CheckpointError for a value that is missing or unusable."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise CheckpointError(f"{file}: {_first_fault(error, values)}") from error
        config._file = file
        return config

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self._file}: {message}")

    def decoder_shape(self, **shape: Any) -> DecoderConfig:
        """A decoder's shape. Raises CheckpointError, naming the file, for an impossible one."""
        try:
            return DecoderConfig(**shape)
        except AdapterError as error:
            raise self.error(str(error)) from error


def _first_fault(error: ValidationError, values: dict[str, Any]) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{key} is {'None' if key in values else 'missing'}, but required"
    reason = fault["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{key} is {fault['input']!r}; {reason}"
