"""Check that every node sees the folders that a job shares between nodes."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from rayjobs.errors import UserError
from rayjobs.storage.paths import is_url


def assert_shared_storage(*folders: str | Path) -> None:
    """For a worker: that it sees folders that the driver has made, before it works for nothing. Raises ValueError."""
    for folder in folders:
        if not is_url(folder) and not Path(folder).is_dir():
            raise UserError(not_shared_message(folder, [platform.node()]))


def not_shared_message(folder: str | Path, hosts: Iterable[str]) -> str:
    """What a user is told of a folder that some machines do not see."""
    return (
        f"{folder} is not the same folder on {', '.join(sorted(hosts))}: on several machines, run.storage and "
        "run.cache have to be folders that all of them see, or URLs"
    )


def check_every_node_sees(folder: Path) -> None:
    """Asks every other node for a file in the folder; those that come later ask themselves (`check_seen`). Raises
    ValueError naming those that do not see it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(prefix=".seen-", dir=folder) as file:
        asked = ray.remote(os.path.lexists)
        told = {
            asked.options(num_cpus=0, scheduling_strategy=On(node, soft=False)).remote(file.name): name
            for node, name in others.items()
        }
        blind = []
        for answer, name in told.items():
            with suppress(ray.exceptions.RayError):  # a node that goes as it is asked
                if not ray.get(answer, timeout=60):
                    blind.append(name)
    if blind:
        raise UserError(not_shared_message(folder, blind))
