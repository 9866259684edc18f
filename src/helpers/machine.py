"""What a number was made on: the facts of this machine that every record carries."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import cpuinfo
import psutil

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


def instructions(isa: Sequence[str]) -> str:
    """Name of the best INT8 instructions of a machine, see INSTRUCTIONS; empty without any. isa: as in `machine_facts`."""
    return next((name for flag, name in INSTRUCTIONS.items() if flag in isa), "")
