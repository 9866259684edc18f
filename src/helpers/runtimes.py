"""Everything that executes a model: eager PyTorch, TorchScript, ONNX Runtime and OpenVINO.

Called by notebooks; calls `quantization` and `models`. Every runtime is reached through `load_predictor`, so what is timed
is what was scored.
"""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from helpers.files import StudyError, whole_file
from helpers.models import Predictor, module_predictor
from helpers.quantization import load_arm, set_engine

# No telemetry: OpenVINO and NNCF fall back to their silent stubs when this package cannot be imported.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF looks for CUDA; this is about CPUs
import nncf  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import openvino  # noqa: E402

# TorchScript and the TorchScript-based ONNX exporter are deprecated; both are measured because the reference study used
# them, and the newer exporter refuses eager-mode quantized models (torch 2.14).
for _message in ("`?torch.jit", "You are using the legacy TorchScript-based ONNX export", ".*legacy.*ONNX.*"):
    for _category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", message=_message, category=_category)
nncf.set_log_level("ERROR")
# NNCF draws its progress bars with a widget library that the study does not need.
warnings.filterwarnings("ignore", message='install "ipywidgets" for Jupyter support')

RUNTIMES = ("eager", "torchscript", "onnxruntime", "openvino")
SUFFIXES = {"eager": ".safetensors", "torchscript": ".pt", "onnxruntime": ".onnx", "openvino": ".xml"}
OPSET = 17


def export_torchscript(model: nn.Module, path: Path) -> None:
    """Script, freeze (weights become constants, so batch norm can be folded) and save a model in eval mode."""
    frozen = torch.jit.freeze(torch.jit.script(model.eval()))
    with whole_file(path) as aside:
        torch.jit.save(frozen, aside)


def export_onnx(model: nn.Module, path: Path, size: int = 32) -> None:
    """Write a float or INT8 model as ONNX with a free batch size, and check the file; INT8 layers become QDQ pairs.

    Raises StudyError when the file does not pass ONNX's own checker.
    """
    with whole_file(path) as aside:
        torch.onnx.export(
            model.eval(),
            torch.zeros(1, 3, size, size),
            aside,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
        try:
            onnx.checker.check_model(str(aside), full_check=True)
        except onnx.checker.ValidationError as error:
            raise StudyError(f"{path.name} does not pass the ONNX checker ({error}).") from error


def save_openvino(model: "openvino.Model", path: Path) -> None:
    """Write an OpenVINO IR: `path` (.xml) and the .bin beside it. Weights keep their type (the default would halve them)."""
    with whole_file(path) as aside:
        openvino.save_model(model, aside, compress_to_fp16=False)
        aside.with_suffix(".bin").replace(path.with_suffix(".bin"))


def convert_to_openvino(onnx_path: Path, path: Path) -> None:
    """Convert an ONNX file to an OpenVINO IR at `path` (.xml)."""
    save_openvino(openvino.convert_model(onnx_path), path)


def quantize_openvino(float_path: Path, images: Tensor, path: Path) -> None:
    """Quantize a float IR with NNCF's post-training quantization, calibrated on `images`, float32 [N, 3, H, W], normalised."""
    model = openvino.Core().read_model(float_path)
    calibration = nncf.Dataset([image.unsqueeze(0).numpy() for image in images])
    save_openvino(nncf.quantize(model, calibration, subset_size=len(images)), path)


def artifact_bytes(path: Path) -> int:
    """Size of a model on disk: the file, and for an OpenVINO IR its .bin too."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def load_predictor(path: Path, runtime: str, threads: int = 0, engine: str = "fbgemm") -> Predictor:
    """Load a model file into a runtime: f(images float32 [N, 3, 32, 32]) -> logits float32 [N, 10], numpy arrays.

    threads: of this runtime, 0 for its own default; PyTorch's count holds for the whole process, so load together what
    shares a count. engine: whose INT8 kernels eager and TorchScript use. OpenVINO computes in float32 where the model is
    float, also where the CPU has bfloat16. Shapes are fixed inside: the first call with a new N compiles for it.
    Raises StudyError for an unknown runtime, or a file that is missing or that the runtime cannot read.
    """
    path = Path(path)
    if runtime not in RUNTIMES:
        raise StudyError(f"runtime is {runtime!r}; allowed are {', '.join(RUNTIMES)}.")
    if not path.exists():
        raise StudyError(f"{path} does not exist; run the notebook that makes it first.")
    if threads:
        torch.set_num_threads(threads)
    try:
        if runtime == "eager":
            return module_predictor(load_arm(path, engine))
        if runtime == "torchscript":
            set_engine(engine)
            return module_predictor(torch.jit.load(path))
        return _onnxruntime(path, threads) if runtime == "onnxruntime" else _openvino(path, threads)
    except StudyError:
        raise
    except Exception as error:  # each runtime has its own exceptions for a file it cannot read
        first_line = str(error).strip().splitlines()[0]
        raise StudyError(f"{runtime} cannot read {path} ({first_line}); delete it and make it again.") from error


def _onnxruntime(path: Path, threads: int) -> Predictor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after a call would slow down whatever is measured next in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _openvino(path: Path, threads: int) -> Predictor:
    core = openvino.Core()
    model = core.read_model(path)
    requests: dict[int, openvino.InferRequest] = {}

    def predictor(images: np.ndarray) -> np.ndarray:
        n = len(images)
        if n not in requests:
            requests[n] = _compile_openvino(core, model, n, threads).create_infer_request()
        # Writing into the request's own tensor spares a call the dictionary of inputs: a tenth of ResNet18's INT8 latency.
        np.copyto(requests[n].get_input_tensor().data, images)
        requests[n].infer()
        return requests[n].get_output_tensor().data.copy()

    return predictor


def _compile_openvino(
    core: "openvino.Core", model: "openvino.Model", batch: int, threads: int
) -> "openvino.CompiledModel":
    fixed = model.clone()
    fixed.reshape([batch, *list(model.input(0).partial_shape)[1:]])
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(fixed, "CPU", config)


def layers_run_as(path: Path, runtime: str) -> list[dict[str, str]]:
    """What the runtime really executes for each convolution and matrix product, after its own graph optimisation.

    Returns rows with layer, type (convolution or linear), precision (int8 or float32) and kernel (the runtime's own word).
    runtime: onnxruntime or openvino. Raises StudyError for another one.
    """
    if runtime == "openvino":
        return list(_openvino_layers(path))
    if runtime == "onnxruntime":
        return list(_onnxruntime_layers(path))
    raise StudyError(f"runtime is {runtime!r}; the executed graph can be read from onnxruntime and openvino.")


def _openvino_layers(path: Path) -> Iterator[dict[str, str]]:
    core = openvino.Core()
    compiled = _compile_openvino(core, core.read_model(path), 1, 0)
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _OPENVINO_FACTS}
        kind = {"Convolution": "convolution", "FullyConnected": "linear", "MatMul": "linear"}.get(
            info.get("layerType", "")
        )
        if kind:
            int8 = info["runtimePrecision"] in ("i8", "u8")
            yield {
                "layer": node.get_friendly_name(),
                "type": kind,
                "precision": "int8" if int8 else "float32",
                "kernel": info["primitiveType"],
            }


_OPENVINO_FACTS = {"layerType", "runtimePrecision", "primitiveType"}


def _onnxruntime_layers(path: Path) -> Iterator[dict[str, str]]:
    with whole_file(path.with_suffix(".optimized.onnx")) as aside:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(aside)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(aside).graph.node
    path.with_suffix(".optimized.onnx").unlink()
    for node in nodes:
        kind = "convolution" if "Conv" in node.op_type else "linear" if node.op_type in _ONNX_LINEAR else None
        if kind:
            int8 = node.op_type.startswith(("QLinear", "QGemm")) or "Integer" in node.op_type
            yield {
                "layer": node.name,
                "type": kind,
                "precision": "int8" if int8 else "float32",
                "kernel": node.op_type,
            }


_ONNX_LINEAR = {"Gemm", "MatMul", "FusedGemm", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger"}


def openvino_benchmark_app(path: Path, threads: int, batch: int, seconds: int = 5) -> float:
    """Median latency in ms by OpenVINO's own `benchmark_app`, in a process of its own: one synchronous request at a time.

    Raises StudyError when the tool fails.
    """
    command = [
        *(sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"),
        *("-m", str(path), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"),
        *("-infer_precision", "f32", "-nthreads", str(threads), "-shape", f"[{batch},3,32,32]", "-t", str(seconds)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    for line in result.stdout.splitlines():
        if "Median:" in line:
            value, unit = line.split("Median:")[1].split()
            return float(value) / {"ms": 1, "us": 1000}[unit]
    raise StudyError(
        f"benchmark_app gave no median for {path} ({result.stderr.strip()[-200:] or result.stdout[-200:]})."
    )
