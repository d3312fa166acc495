"""Compare what two versions of this project compute: run the demo of both and compare all results bit by bit.

    python -m tests.compare_demo OLD NEW

OLD and NEW are each a commit, whose demo is run in a checkout of its own, or a folder that a demo has been run in
(`python -m rayjobs demo run.storage=FOLDER`). The proof for every change that is not meant to change a number. A demo
takes about three minutes on two cores.

Compared are adapters, caches, features, tokens, trained models, choices, predictions, metrics, tables, generated
images. Left out is what says when, where and how fast: run records, hardware, versions, timings, reports and plots.
Digests in folder names are ignored, and so are all names in the cache: contents are matched with contents.

Exit code: 0 equal, 1 different.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

LEFT_OUT = re.compile(
    r"(^|/)(run|versions|hardware|config|seconds-.*|settings|source|checkpoint_manager_snapshot|figures)\.(json|yaml)$"
    r"|(^|/)(tensorboard|train|parts|tune|\.lease)/|\.(svg|html|lock|ya?ml)$|(^|/)\.[^/]*$|/lock$"
    r"|(^|/)(classes|confusion|landscape|shots|sources|curves|loss|lr|tokens|val|busy)[^/]*\.png$"
)
TIMINGS = {
    "seconds",
    "seconds_to_first_step",
    "tokens_per_s",
    "busy",
    "workers",
    "data_read",
    "peak_memory_bytes",
    "command",
    "host",
    "pid",
    "started",
    "opened",
    "about",
    "parts",
    "runs",
}
DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{16,64}(?![0-9a-f])")


def main(old: str, new: str) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folders = [run_demo(version, Path(scratch) / str(i)) for i, version in enumerate((old, new))]
        found = [contents(folder) for folder in folders]
    groups = sorted(found[0].keys() | found[1].keys())
    different = [group for group in groups if found[0].get(group) != found[1].get(group)]
    for group in different:
        counts = [sum(one.get(group, Counter()).values()) for one in found]
        equal = sum((found[0].get(group, Counter()) & found[1].get(group, Counter())).values())
        print(f"different: {group}: {counts[0]} and {counts[1]} files, {equal} of them equal")
    total = sum(sum(counter.values()) for counter in found[0].values())
    print(f"{total} files in {len(groups)} groups compared, {len(different)} groups differ")
    return int(bool(different))


def run_demo(version: str, scratch: Path) -> Path:
    """The folder that the demo of this version wrote: `version` itself, or a new one for a commit."""
    if Path(version).is_dir():
        return Path(version)
    root = Path(__file__).parents[1]
    checkout, storage = scratch / "checkout", scratch / "storage"
    subprocess.run(["git", "-C", root, "worktree", "add", "--detach", checkout, version], check=True)
    try:
        command = [sys.executable, "-m", "rayjobs", "demo", f"run.storage={storage}"]
        subprocess.run(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True)
    finally:
        subprocess.run(["git", "-C", root, "worktree", "remove", "--force", checkout], check=True)
    return storage


def contents(folder: Path) -> dict[str, Counter[str]]:
    """For every group of files that have a name in common but for digests, the digests of their contents."""
    groups: dict[str, Counter[str]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not LEFT_OUT.search(name):
            group = re.sub(r"\d+(?=\.(png|jpg|parquet)$)", "N", DIGEST.sub("*", name))
            if name.startswith("cache/"):
                group = f"cache/**{file.suffix}"
            groups.setdefault(group, Counter())[fingerprint(file)] += 1
    return groups


def fingerprint(file: Path) -> str:
    """Digest a file's content, without what says when and where it was made."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        table = table.drop_columns([name for name in table.column_names if name in TIMINGS])
        content = repr(table.schema.names) + json.dumps(strip(table.to_pylist()), default=repr)
    elif file.suffix == ".safetensors":  # its metadata has no order of its own
        with safe_open(file, "pt") as tensors:
            digests = {name: _tensor_digest(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
            content = json.dumps([tensors.metadata(), digests], sort_keys=True)
    elif file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8")
        values = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
        content = json.dumps(strip(values))
    else:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> list[str]:
    content = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
    return [str(tensor.dtype), str(list(tensor.shape)), hashlib.sha256(content.numpy().tobytes()).hexdigest()]


def strip(value: Any) -> Any:
    """The value without timings, absolute paths and digests."""
    if isinstance(value, dict):
        return {name: strip(inner) for name, inner in value.items() if name not in TIMINGS}
    if isinstance(value, list):
        return [strip(inner) for inner in value]
    if isinstance(value, str):
        return DIGEST.sub("*", re.sub(r"/[^\s\"']*/(?=[^/\s\"']+)", "/…/", value))
    return value


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
