"""What a number was made on: the facts of this machine that every record carries."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cpuinfo
import psutil

from helpers.files import StudyError

VERSIONS_OF = (
    "torch",
    "torchvision",
    "openvino",
    "nncf",
    "onnx",
    "onnxruntime",
    "torchao",
    "numpy",
    "pandas",
    "papermill",
)
ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
    "bf16",
)


_cpu_info = cache(cpuinfo.get_cpu_info)  # a second and more each time


def machine_facts() -> dict[str, Any]:
    """CPU model, instruction sets that matter for INT8, cores, memory, GPU, system and versions of this machine.

    A package that is not installed has no version: training needs no OpenVINO.
    """
    import torch  # what only reads results does without

    info = _cpu_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": info.get("brand_raw", platform.machine()),
        "isa": [flag for flag in ISA_FLAGS if flag in info.get("flags", [])],
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS_OF if find_spec(name)},
    }


def machine_name(facts: Mapping[str, Any]) -> str:
    """One line that tells machines apart: CPU, cores and the instruction sets that decide INT8 speed."""
    isa = "+".join(flag for flag in facts["isa"] if flag != "avx512f") or "no special instructions"
    return f"{facts['cpu']}, {facts['cores']} cores, {isa}"


def cpu_quota(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many CPUs the control group of this process may keep busy, as containers are limited; None without a limit.

    mounted: where control groups are mounted, version 2 or 1; own: the file that says which one this process is in. A group
    above may have the tighter limit.
    """
    groups = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    paths = {
        parts[2].lstrip("/") for parts in groups if len(parts) == 3 and ("cpu" in parts[1].split(",") or not parts[1])
    }
    quotas = []
    for folder in {above for path in paths | {""} for above in (Path(path), *Path(path).parents)}:
        limit = _words(mounted / folder / "cpu.max")  # version 2: "max 100000" or "150000 100000"
        limit = limit or [
            word for name in ("quota", "period") for word in _words(mounted / "cpu" / folder / f"cpu.cfs_{name}_us")
        ]
        if len(limit) == 2 and limit[0].isdigit() and int(limit[0]) > 0:
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def check_threads(threads: list[int]) -> None:
    """Raise StudyError for a count of threads that the quota of this process cannot keep busy: they would wait for each other."""
    quota = cpu_quota()
    if quota is not None and max(threads) > math.ceil(quota):
        raise StudyError(
            f"threads is {threads}, but this container may use {quota:g} CPUs; give at most {math.ceil(quota)}."
        )
