"""The words of the results: columns of the tables, names of runs and arrays, and what each arm, runtime and model is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.files import StudyError

# reason: why an arm cannot be had in a runtime; such a row has no numbers, and no row in another table.
# engine: whose INT8 kernels eager and TorchScript used (fbgemm or x86); empty where there is no such choice.
# training: 0 for the weights that were timed, 1 and up for other trainings of the same seed.
# size: height and width of the images in pixels. pace: hot (call after call) or idle_N (each call after N ms of rest).
COLUMNS: dict[str, list[str]] = {
    "accuracy": (
        "arch recipe arm runtime engine seed training data split n correct accuracy ci_low ci_high run_id".split()
    ),
    "latency": (
        "arch recipe arm runtime engine threads batch size pace rounds median_ms p90_ms p95_ms cv "
        "speedup speedup_low speedup_high machine run_id"
    ).split(),
    "size": "arch recipe arm runtime seed parameters weight_bytes artifact_bytes run_id".split(),
    "exports": "arch recipe arm runtime seed export_seconds first_call_ms agreement n reason run_id".split(),
    "training": "arch recipe arm seed epoch lr train_loss val_accuracy seconds images_per_second run_id".split(),
    "profile": "arch recipe arm runtime engine threads batch check setting value unit run_id".split(),
    "diagnosis": "arch recipe second_relu seed epochs data split check setting n value run_id".split(),
    # What served one model: threads of each stream (0: the runtime's own choice), setting (other ways to wait, pin, keep warm),
    # pace (as of latency, or load_N: random arrivals at N % of what the same service answers when hot), rate (requests a second).
    "load": (
        "arch arm runtime threads batch size streams processes setting pace rate n images_per_second p50_ms p99_ms "
        "cores_busy memory_bytes machine run_id"
    ).split(),
    # One row for each draw of calibration images; FP32 has no observer, no images and no seconds.
    "calibration": (
        "arch recipe seed observer weights images draw data split n correct accuracy seconds run_id".split()
    ),
    # Models that the study did not make, and its ResNet18 beside them. int8_layers: the share of convolutions and linear layers
    # that ran in INT8, of `layers`; agreement, top1: with FP32 and with the labels, on n images; reason: why there is no number.
    "yours": (
        "model arm runtime file_bytes first_call_ms agreement top1 n sqnr_db int8_layers layers reason run_id".split()
    ),
    "yours_latency": (
        "model arm runtime threads batch size pace rounds median_ms p90_ms p95_ms cv "
        "speedup speedup_low speedup_high machine run_id"
    ).split(),
    "yours_calibration": "model ranges images draw n agreement seconds run_id".split(),
}
# Numbers that a row may lack: speed-ups of before they had intervals, and what a row of exports has none of.
MAY_BE_MISSING = ("speedup_low", "speedup_high", "export_seconds", "first_call_ms", "agreement", "n")
MAY_BE_MISSING += ("file_bytes", "top1", "sqnr_db", "int8_layers", "layers")


@dataclass(frozen=True)
class Arm:
    """What was done to the weights of an arm."""

    label: str  # in plain words, for tables and figures
    int8: bool = False  # quantized (to 8 bits, or simulated at other widths)
    retrained: bool = False  # trained further than the fp32 arm, with or without quantization in the loop
    deprecated: bool = False  # quantized by PyTorch's eager mode, wherever it runs then
    trimmed: bool = False  # without the kernel taps that only see padding
    untrimmed: str = ""  # the arm with its dead taps, where this one was trimmed

    @property
    def control(self) -> str:
        """FP32 that trained further if this arm did: what its accuracy is set beside."""
        return "fp32_longer" if self.retrained else "fp32"


def _int8(label: str, **facts: Any) -> Arm:
    return Arm(label, int8=True, **facts)


def _eager(label: str, **facts: Any) -> Arm:
    return Arm(label, int8=True, deprecated=True, **facts)


ARMS: dict[str, Arm] = {
    "fp32": Arm("FP32"),
    "fp32_longer": Arm("FP32, trained longer", retrained=True),
    "fp32_trimmed": Arm("FP32, trimmed", trimmed=True, untrimmed="fp32"),
    "ptq": _eager("INT8 (PyTorch eager)"),
    "ptq_default": _eager("INT8 (PyTorch eager, default observers)"),
    "ptq_longer": _eager("INT8 (PyTorch eager), trained longer", retrained=True),
    "ptq_trimmed": _eager("INT8 (PyTorch eager), trimmed", trimmed=True, untrimmed="ptq"),
    "ptq_longer_trimmed": _eager(
        "INT8 (PyTorch eager), trained longer, trimmed", retrained=True, trimmed=True, untrimmed="ptq_longer"
    ),
    "trimmed_ptq": _eager("INT8 (PyTorch eager), trimmed before", trimmed=True, untrimmed="ptq"),
    "ptq_nncf": _int8("INT8 (NNCF)"),
    "ptq_nncf_control": _int8("INT8 (NNCF, accuracy control)"),
    "ptq_longer_nncf": _int8("INT8 (NNCF), trained longer", retrained=True),
    "trimmed_ptq_nncf": _int8("INT8 (NNCF), trimmed", trimmed=True, untrimmed="ptq_nncf"),
    "ptq_ort": _int8("INT8 (S8 activations)"),
    "ptq_ort_u8": _int8("INT8 (U8 activations)"),
    "ptq_pt2e": _int8("INT8 (PT2E)"),
    "qat": _eager("QAT (PyTorch eager)", retrained=True),
    "qat_trimmed": _eager("QAT (PyTorch eager), trimmed", retrained=True, trimmed=True, untrimmed="qat"),
    "qat_observer_only": _eager('"QAT" of observers only', retrained=True),
    "qat_nncf": _int8("QAT (NNCF)", retrained=True),
    "qat_pt2e": _int8("QAT (PT2E)", retrained=True),
    **{
        f"{arm}_{width}": _eager(f"{label}, {bits}, simulated", retrained=retrained)
        for width, bits in {"w8a8": "8 bits", "w4a8": "4-bit weights", "w4a4": "4 bits"}.items()
        for arm, label, retrained in (
            ("ptq", "PTQ", False),
            ("ptq_longer", "PTQ, trained longer", True),
            ("ptq_longer_default", "PTQ, trained longer, default observers", True),
            ("qat", "QAT", True),
        )
    },
}
RUNTIMES: dict[str, str] = {
    "eager": "PyTorch",
    "eager_channels_last": "PyTorch, channels_last",
    "torchscript": "TorchScript",
    "inductor": "Inductor",
    "aotinductor": "AOTInductor",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino_bf16": "OpenVINO, bfloat16",
    "simulated": "simulated",
}
TOOLS = {
    "ort": "onnxruntime",
    "pt2e": "inductor",
    "nncf": "openvino",
}  # tools that quantize, and what runs what they make
ENOUGH = 100  # requests, the least for a 99th percentile
PYTORCH = ("eager", "torchscript", "inductor", "aotinductor")  # runtimes that need nothing but PyTorch
DEPRECATED_RUNTIMES = ("torchscript",)
RANDOM = "random"  # the recipe of weights that were never trained, where only latency is asked
ARCH_LABELS: dict[str, str] = {
    "resnet18": "ResNet18",
    "resnet18_cifar": "ResNet18, CIFAR stem",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
}
OBSERVERS: dict[str, str] = {
    "histogram": "histogram (PyTorch's default)",
    "minmax": "smallest and largest value",
    "percentile": "all but the most extreme values",
    "image_percentile": "all but the most extreme 5 % of images",
}


def arm_facts(arm: str) -> Arm:
    """What was done to the weights of `arm`. Raises StudyError for an arm that ARMS does not describe."""
    if arm not in ARMS:
        raise StudyError(f"The results name the arm {arm!r}; describe it in ARMS of helpers.report.schema.")
    return ARMS[arm]


def is_deprecated(arm: str, runtime: str) -> bool:
    """Whether any step of a path is: eager-mode quantization, with the exporter that only it needs, or TorchScript."""
    return arm_facts(arm).deprecated or runtime in DEPRECATED_RUNTIMES


def run_name(notebook: str, arch: str = "", recipe: str = "", seed: int | None = None) -> str:
    """The run_id of one notebook with one parameter set, for example 02_ptq-resnet18-tuned-s0."""
    parts = [notebook, arch, recipe, "" if seed is None else f"s{seed}"]
    return "-".join(part for part in parts if part)


def prediction_key(arm: str, runtime: str, engine: str = "") -> str:
    """Name of one array in a predictions file, for example ptq-eager-fbgemm."""
    return "-".join(part for part in (arm, runtime, engine) if part)


def times_key(row: Mapping[str, Any]) -> str:
    """Name of the array of times behind one row of latency, for example ptq-eager-fbgemm-t2-b1.

    Other sizes than 32 and other paces than hot are named, ...-i224-idle_10; and with random weights the arch, resnet18-...,
    because a run of those times several.
    """
    key = f"{prediction_key(row['arm'], row['runtime'], row['engine'])}-t{row['threads']}-b{row['batch']}"
    size, pace = row.get("size", 32), row.get("pace", "hot")
    if (size, pace) != (32, "hot"):
        key += f"-i{size}-{pace}"
    return f"{row['arch']}-{key}" if row["recipe"] == RANDOM else key
