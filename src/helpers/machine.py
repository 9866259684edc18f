"""What a number was made on: the facts of this machine that every record carries."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
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
# The instructions that decide how fast INT8 is: flag and name, the best first; a CPU is called by the first that it has.
INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "Arm I8MM",
    "asimd": "Arm NEON",
}


_cpu_info = cache(cpuinfo.get_cpu_info)  # a second and more each time


def isa_here() -> list[str]:
    """Which of ISA_FLAGS this CPU has."""
    return [flag for flag in ISA_FLAGS if flag in _cpu_info().get("flags", [])]


def machine_facts() -> dict[str, Any]:
    """CPU model, instruction sets that matter for INT8, cores, memory, GPU, system and versions of this machine.

    A package that is not installed has no version: training needs no OpenVINO.
    """
    import torch  # what only reads results does without

    info = _cpu_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": info.get("brand_raw", platform.machine()),
        "isa": isa_here(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "cpu_quota": cpu_quota(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS_OF if find_spec(name)},
    }


def machine_name(facts: Mapping[str, Any]) -> str:
    """One line that tells machines apart: CPU, cores and the instruction sets that decide INT8 speed."""
    implied = "avx512f" if any(flag.startswith("avx512_") for flag in facts["isa"]) else ""
    isa = "+".join(flag for flag in facts["isa"] if flag != implied) or "no special instructions"
    return f"{facts['cpu']}, {facts['cores']} cores, {isa}"


def cpu_quota(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' worth of CPU time the cgroups of this process may use, for example 1.5; None where nothing limits it.

    The least of its cgroup and all above it, of version 2 (`cpu.max`) and 1 (`cpu.cfs_quota_us`). mount and membership:
    where Linux keeps the limits, and which cgroups a process is in (cgroups(7)).
    """
    limits = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops = [mount, mount / "unified"] if not controllers else [mount / controllers, mount / "cpu"]
        # Inside a container the path may be the host's, which is not mounted; what limits it then stands at the top.
        inner = Path(path.lstrip("/"))
        folders = [top / part for top in tops for part in (inner, *inner.parents)]
        limits += [limit for limit in map(_limit, folders) if limit]
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    """What one cgroup allows."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").exists():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def usable_cores(asked: int = 0) -> int:
    """How many cores this process may keep busy: those that it may run on, and no more than its CPU quota, rounded down.

    asked: fewer than that, or 0 for all. Raises StudyError for more than there are.
    """
    runs_on, quota = len(os.sched_getaffinity(0)), cpu_quota()
    there = runs_on if quota is None else min(runs_on, _whole_cores(quota))
    if asked > there:
        limit = "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
        raise StudyError(
            f"{asked} cores are asked for, but this process may use {there} (it runs on {runs_on}, with {limit}); give 1 to {there}, or 0 for all."
        )
    return asked or there


def check_threads(threads: Sequence[int]) -> None:
    """Raise StudyError for a count of threads that the CPU quota of this process cannot keep busy: they would wait for each other."""
    quota = cpu_quota()
    if quota is not None and max(threads) > (most := _whole_cores(quota)):
        raise StudyError(f"threads is {list(threads)}, but this process may use {quota:g} CPUs; give at most {most}.")


def _whole_cores(quota: float) -> int:
    """Threads that a CPU quota keeps busy all the time: one more would be stopped for part of it."""
    return max(1, int(quota))


def sums_saturate(isa: Sequence[str]) -> bool:
    """Whether a CPU adds products of 8-bit numbers in 16 bits, which may overflow: x86 without VNNI. isa: as in `machine_facts`."""
    return "avx2" in isa and not {"avx512_vnni", "avx_vnni"} & set(isa)


def instructions(isa: Sequence[str]) -> str:
    """Name of the best INT8 instructions of a machine, see INSTRUCTIONS; empty without any. isa: as in `machine_facts`."""
    return next((name for flag, name in INSTRUCTIONS.items() if flag in isa), "")
