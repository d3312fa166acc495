"""Describe the hardware of a run: the driver's machine and the cluster that it is connected to."""

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
    """Return names and counts of the CPUs and GPUs, the size of the memory and, if connected, the cluster's nodes."""
    hardware = {
        "CPU": f"{os.cpu_count()} × {_cpu_name()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": ", ".join(f"{count} × {name}" for name, count in Counter(_gpu_names()).items()) or "none",
    }
    ray = sys.modules.get("ray")  # a process that has not imported Ray is not connected; the import takes seconds
    if ray and ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        gpu_types = {name.partition("accelerator_type:")[2] for node in nodes for name in node} - {""}
        gpu_phrase = f", {gpus:g} GPU ({', '.join(sorted(gpu_types))})" if gpus else ""
        hardware["cluster"] = f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {cpus:g} CPU{gpu_phrase}"
    return hardware


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    """Ask nvidia-smi: through PyTorch, this process would reserve memory on the GPUs."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.splitlines() if answer.returncode == 0 else []
