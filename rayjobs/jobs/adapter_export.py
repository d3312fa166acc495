"""Write an adapter in the format of other code: the official v1 file, litgpt's file, or PEFT's folder.

What a format cannot express is refused with the reason. Nothing is trained or run, so that this job needs no cluster,
and of the base its settings alone. `docs/formats.md` says what each format holds and how it is loaded.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from adapter.adapter_export import Format, check_export, export_adapter
from adapter.adapter_file import AdapterFile, check_identities
from adapter.adapter_formats import read_adapter
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from rayjobs.console import show_result, show_table
from rayjobs.job_configs.adapter_export import Config
from rayjobs.lifecycle import job
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path
from rayjobs.storage.fingerprint import content_fingerprint

OUT: dict[Format, str] = {"v1": "adapter.pth", "litgpt": "lit_model.pth.adapter", "peft": "peft"}
"""Name of each format's file, or of PEFT's folder, in the run folder; litgpt looks for its own by this name."""
LOADED_BY: dict[Format, str] = {
    "v1": "the official LLaMA-Adapter v1 code",
    "litgpt": "litgpt up to 0.5.4; later ones read the prompts' keys from wrong rows, unless the base has one kv head",
    "peft": "peft.PeftModel.from_pretrained(base, folder)",
}


class Checked(NamedTuple):
    """Inputs that `check` has opened."""

    file: AdapterFile
    base: DecoderConfig
    identity: dict[str, str]
    """what the export depends on, by content"""


def check(settings: Config) -> Checked:
    """Read the adapter and the base's settings, and check that the format can express the one on the other.

    Raises a UserError or an AdapterError for the first problem.
    """
    checkpoint, _ = settings.base.open(weights=False)
    file = read_adapter(cached_path(settings.adapter))
    fingerprint = checkpoint.fingerprint() if checkpoint.has_weights else None
    try:
        check_identities(file, fingerprint, None)
        check_export(file, settings.format, checkpoint.config, gate=settings.gate)
    except CheckpointError as error:
        raise CheckpointError(f"{settings.adapter}: {error}") from error
    identity = {
        "base": fingerprint[:16] if fingerprint else settings.base.path,
        "adapter": content_fingerprint(cached_path(settings.adapter)),
        "format": settings.format,
        "gate": settings.gate,
    }
    check_provenance(settings.run.folder / "source.json", identity)
    return Checked(file, checkpoint.config, identity)


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    file = check(settings).file
    rows = [
        ["base", settings.base.path],
        ["adapter", f"{settings.adapter}: {file.config.describe()}"],
        ["out", str(settings.run.folder / OUT[settings.format])],
        ["loaded by", LOADED_BY[settings.format]],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Write the adapter in its new format; return and write `result.json`."""
    file, base, identity = check(settings)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / "source.json", identity)
    name = settings.base.path.removeprefix("hf://").partition("@")[0]
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / OUT[settings.format]
        export_adapter(file, made, settings.format, base, gate=settings.gate, base_name=name)
        parts = sorted(made.iterdir(), reverse=True) if made.is_dir() else [made]  # PEFT's configuration comes last
        for part in parts:
            with atomic_path(folder / part.relative_to(scratch).as_posix()) as target:
                shutil.copyfile(part, target)
    result = {
        "headline": f"{file.config.describe()}, in the format {settings.format}",
        "format": settings.format,
        "loaded_by": LOADED_BY[settings.format],
        "layers": file.config.n_layers or base.n_layers,
        "first_layer": base.n_layers - (file.config.n_layers or base.n_layers),
        **({"prompt_length": file.prompt.shape[1]} if "prompt" in file.tensors else {}),
        "out": str(folder / OUT[settings.format]),
    }
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result
