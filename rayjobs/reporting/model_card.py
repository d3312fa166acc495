"""The model card of a run that trained an adapter: `README.md` with the metadata that the Hugging Face hub reads.

It is made from the files that the run left, and names files of this machine without their folders.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from adapter.adapter_file import AdapterFile
from adapter.adapter_formats import read_adapter
from rayjobs.cluster.hardware import HARDWARE_FILE
from rayjobs.config import flatten, format_value
from rayjobs.reporting.report import read_metrics
from rayjobs.runs.record import RESULT_FILE, read_record
from rayjobs.runs.run_dir import CONFIG_FILE, PROVENANCE_FILE, VERSIONS_FILE
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_object, write_text
from rayjobs.storage.hub import HubPath, is_hub_path, public_name
from rayjobs.storage.hub_model import ADAPTER_FILE
from rayjobs.storage.paths import is_url
from rayjobs.storage.yaml_file import dump_yaml, read_yaml

CARD_FILE = "README.md"
TEMPLATE = "model_card.md.jinja"
CURVE_ROWS = 10
"""Most rows in the table of held-out losses."""
UNPUBLISHED = ("base.path", "data.path", "data.val_path", "run", "scale", "vision.encoder.weights")
"""Settings, and their sections, that the table of settings leaves out: what is told elsewhere, or of this machine."""


def write_card(folder: Path) -> None:
    """Write the card of a finished run into its folder, unless it has one, which a person may have edited."""
    if (folder / ADAPTER_FILE).is_file() and not (folder / CARD_FILE).is_file():
        write_text(folder / CARD_FILE, run_card(folder))


def run_card(folder: Path) -> str:
    """The card of a finished run of adapter-train, in Markdown. Raises DataError for files that cannot be read."""
    config, result = read_yaml(folder / CONFIG_FILE), read_object(folder / RESULT_FILE)
    record = read_record(folder)
    sources = [source if isinstance(source, Mapping) else {"path": source} for source in _sources(config["data"])]
    digests = _json(folder / PROVENANCE_FILE).get("identity", {}).get("data", {})
    identified = [*digests.get("path", []), *digests.get("val_path", [])]
    data = [
        [public_name(source["path"]), str(given.get("format") or ""), str(given.get("records") or "")]
        for source, given in zip(sources, [*identified, *[{}] * len(sources)], strict=False)
    ]
    settings = flatten(publishable(config))
    hardware = [str(value) for value in _json(folder / HARDWARE_FILE).values() if value != "none"]
    return _render(
        title=folder.name,
        base=config["base"]["path"],
        file=read_adapter(cached_path(folder / ADAPTER_FILE)),
        datasets=[HubPath.parse(source["path"]).repo_id for source in sources if is_hub_path(source["path"])],
        headline=str(result.get("headline", "")),
        data=data,
        result=[[_spaced(name), format_value(value)] for name, value in result.items() if _is_number(value)],
        curve=_curve(folder),
        settings=[(name, value) for name, value in settings.items() if value and not _is_unpublished(name)],
        facts=[*hardware, *([f"{record.seconds:,.0f} s"] if record else [])],
        versions=list(_json(folder / VERSIONS_FILE).items()),
    )


def adapter_card(path: Path, title: str) -> str:
    """The card of an adapter file of which no run is known, in Markdown. Raises CheckpointError if it is none."""
    unknown = ("datasets", "data", "result", "curve", "settings", "facts", "versions")
    empty: dict[str, Any] = {name: [] for name in unknown}
    return _render(title=title, base="", file=read_adapter(path), headline="", **empty)


def publishable(values: Any) -> Any:
    """Plain values without credentials, and with paths and URLs, other than the hub's, reduced to their last name."""
    if isinstance(values, Mapping):
        return {name: publishable(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [publishable(value) for value in values]
    if isinstance(values, str) and (os.path.isabs(values) or is_url(values)):
        return public_name(mask_credentials(values))
    return values


def _render(*, base: str, file: AdapterFile, datasets: list[str], **values: Any) -> str:
    on_hub = is_hub_path(base)
    metadata = {
        **({"base_model": HubPath.parse(base).repo_id, "base_model_relation": "adapter"} if on_hub else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "library_name": "rayjobs",
        "pipeline_tag": "text-generation" if file.vision is None else "image-text-to-text",
        "tags": ["llama-adapter", "parameter-efficient-fine-tuning"],
    }
    environment = Environment(
        loader=PackageLoader("rayjobs.reporting", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    return environment.get_template(TEMPLATE).render(
        metadata=dump_yaml(metadata),
        file=file,
        base=public_name(base),
        base_id=HubPath.parse(base).repo_id if on_hub else "",
        base_revision=(HubPath.parse(base).revision or "") if on_hub else "",
        **values,
    )


def _sources(data: Mapping[str, Any]) -> list[Any]:
    """The sources of records in a `data` section: those to train on, then those for validation."""
    listed: list[Any] = []
    for name in ("path", "val_path"):
        given = data.get(name) or []
        listed += given if isinstance(given, list) else [given]
    return listed


def _curve(folder: Path) -> list[list[str]]:
    """Steps and held-out losses, at most CURVE_ROWS of them, with the first and the last."""
    rows = [[f"{row['step']:,}", f"{row['val_loss']:.4f}"] for row in read_metrics(folder) if "val_loss" in row]
    if len(rows) <= CURVE_ROWS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_unpublished(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in UNPUBLISHED)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _cell(text: Any) -> str:
    """Text that stays within a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
