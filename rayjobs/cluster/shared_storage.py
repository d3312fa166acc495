"""Check that every node sees the folders that a job shares between nodes."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from rayjobs.errors import StorageError
from rayjobs.storage.paths import is_url, make_folder

ANSWER_WITHIN_S = 60.0


def assert_shared_storage(*folders: str | Path) -> None:
    """Check, in a worker, that this node sees folders that the driver has made. URLs are skipped.

    Raises StorageError. Without the check a worker on a node that was added later would write its results to a disk
    that no other node sees.
    """
    for folder in folders:
        if not is_url(folder) and not Path(folder).is_dir():
            raise StorageError(not_shared_message(folder, [platform.node()]))


def not_shared_message(folder: str | Path, hosts: Iterable[str]) -> str:
    """Return the error message for a folder that some nodes do not see."""
    return (
        f"{folder} is not the same folder on {', '.join(sorted(hosts))}: with several nodes, run.storage and "
        "run.cache must be folders that all nodes see, or URLs"
    )


def check_shared_storage(folder: Path) -> None:
    """Check, in the driver, that every other node sees a folder; the folder is made if it is missing.

    Raises StorageError with the names of the nodes that do not see it. Nodes that join later check for themselves with
    `assert_shared_storage`.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others:
        return
    make_folder(folder)
    with NamedTemporaryFile(prefix=".seen-", dir=folder) as file:
        without = nodes_without_file(file.name, others)
    if without:
        raise StorageError(not_shared_message(folder, without))


def nodes_without_file(path: str, nodes: dict[str, str]) -> list[str]:
    """Return the names of the nodes on which `path` does not exist. A node that is lost meanwhile is left out.

    nodes: {node id: name}.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    exists = ray.remote(os.path.lexists)
    answers = {}
    for node, name in nodes.items():
        on_node = exists.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        answers[on_node.remote(path)] = name
    without = []
    for answer, name in answers.items():
        with suppress(ray.exceptions.RayError):
            if not ray.get(answer, timeout=ANSWER_WITHIN_S):
                without.append(name)
    return without
