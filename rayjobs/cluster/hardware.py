"""What a run ran on: the driver's machine, and the cluster that it is connected to."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil

HARDWARE_FILE = "hardware.json"


def describe_hardware() -> dict[str, str]:
    """Names and counts of CPUs and GPUs, the memory, and the cluster's nodes."""
    found = {
        "CPU": f"{os.cpu_count()} × {_cpu()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": ", ".join(f"{count} × {name}" for name, count in Counter(_gpus()).items()) or "none",
    }
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        kinds = {name.partition("accelerator_type:")[2] for node in nodes for name in node} - {""}
        told = f", {gpus:g} GPU ({', '.join(sorted(kinds))})" if gpus else ""
        found["cluster"] = f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {cpus:g} CPU{told}"
    return found


def _cpu() -> str:
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Asked of the driver's tool: through torch, the process would take hold of them."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True)
    return told.stdout.splitlines() if told.returncode == 0 else []
