"""Everything that executes a model: PyTorch (eager, TorchScript, Inductor), ONNX Runtime and OpenVINO.

Every runtime is reached through `load_predictor`, so what is timed is what was scored.
"""

import copy
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from helpers import quantization
from helpers.files import StudyError, whole_file
from helpers.models import ANY_BATCH, Predictor, module_predictor
from helpers.quantization import load_arm

# No telemetry: OpenVINO and NNCF fall back to their silent stubs when this package cannot be imported.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF looks for CUDA; this is about CPUs
import nncf  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import onnxruntime.quantization  # noqa: E402
import openvino  # noqa: E402

# TorchScript and the TorchScript-based ONNX exporter are deprecated; both are measured because the reference study used
# them, and the newer exporter refuses eager-mode quantized models (torch 2.14).
for _message in ("`?torch.jit", "You are using the legacy TorchScript-based ONNX export", ".*legacy.*ONNX.*"):
    for _category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", message=_message, category=_category)
nncf.set_log_level("ERROR")
# NNCF draws its progress bars with a widget library that the study does not need.
warnings.filterwarnings("ignore", message='install "ipywidgets" for Jupyter support')

# What each runtime loads. Inductor compiles in the process that runs the model, so it starts from the weights.
SUFFIXES = {
    "eager": ".safetensors",
    "torchscript": ".pt",
    "inductor": ".safetensors",
    "aotinductor": ".pt2",
    "onnxruntime": ".onnx",
    "openvino": ".xml",
    "openvino_bf16": ".xml",
}
RUNTIMES = tuple(SUFFIXES)
OPSET = 18  # the least that the dynamo-based exporter writes
LEGACY_OPSET = 17
# They answer a batch image by image, so their time for more than one image is not that of a batch.
ONE_IMAGE_A_CALL = ("aotinductor",)
# Freezing turns weights into constants, so that they are packed for the kernels once; thread counts may change after compiling.
INDUCTOR = {"freezing": True, "cpp.dynamic_threads": True}


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn what a tool raises into a StudyError, so that a row that cannot be had ends no notebook; what: the sentence."""
    try:
        yield
    except StudyError:
        raise
    except Exception as error:  # each tool has its own, and dynamo wraps what Inductor raises
        chain = [error, error.__cause__, getattr(error, "inner_exception", None)]
        if any(type(link).__name__ == "InvalidCxxCompiler" for link in chain):
            raise StudyError("Inductor found no C++ compiler; install g++ (Debian: apt-get install g++).") from error
        first_line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise StudyError(f"{what} ({first_line}).") from error


def _is_eager_int8(model: nn.Module) -> bool:
    return any(hasattr(module, "set_weight_bias") for module in model.modules())


def export_torchscript(model: nn.Module, path: Path) -> None:
    """Script, freeze (weights become constants, so batch norm can be folded) and save a model in eval mode."""
    frozen = torch.jit.freeze(torch.jit.script(model.eval()))
    with whole_file(path) as aside:
        torch.jit.save(frozen, aside)


@_refused("PyTorch's ONNX exporter does not write it")
def export_onnx(model: nn.Module, path: Path, size: int = 32) -> None:
    """Write a model as ONNX with a free batch size, and check the file.

    model: float, a graph of `pt2e`, or INT8 of eager mode, for input float32 [N, 3, size, size]. The dynamo-based exporter
    writes it, but eager mode's INT8 layers, which that one refuses (torch 2.14): the deprecated, TorchScript-based one makes
    QDQ pairs of them. Raises StudyError when the exporter fails, or the file does not pass ONNX's own checker.
    """
    images = (torch.zeros(2, 3, size, size),)
    named = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    with whole_file(path) as aside, torch.no_grad(), redirect_stdout(io.StringIO()):
        if _is_eager_int8(model):
            free = {name: {0: "batch"} for name in ("images", "logits")}
            torch.onnx.export(
                model, images, aside, dynamo=False, opset_version=LEGACY_OPSET, dynamic_axes=free, **named
            )
        else:
            free = {"dynamic_shapes": ANY_BATCH, "opset_version": OPSET}
            program = torch.onnx.export(model.eval(), images, dynamo=True, **free, **named)
            for node in program.model.graph:  # which it numbers; weights keep PyTorch's names
                if node.op_type in ("Conv", "Gemm") and node.inputs[1].name.endswith(".weight"):
                    node.name = node.inputs[1].name.removesuffix(".weight")
            program.save(aside, external_data=False)
        try:
            onnx.checker.check_model(str(aside), full_check=True)
        except onnx.checker.ValidationError as error:
            raise StudyError(f"{path.name} does not pass the ONNX checker ({error}).") from error


export_onnx_graph = export_onnx


@_refused("ONNX Runtime does not quantize it")
def quantize_onnxruntime(
    float_path: Path,
    images: Tensor,
    path: Path,
    activation_type: onnxruntime.quantization.QuantType = onnxruntime.quantization.QuantType.QInt8,
) -> None:
    """Quantize a float ONNX file by ONNX Runtime's static quantization: QDQ, signed weights per channel.

    images: float32 [N, 3, H, W], normalised, for its min-max calibration. activation_type: QInt8 is its own default; QUInt8
    is what x86 kernels multiply fastest with signed weights. Raises StudyError with what it said when it fails.
    """

    class Reader(onnxruntime.quantization.CalibrationDataReader):
        batches = iter(images.split(64))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with whole_file(path) as aside, tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        onnxruntime.quantization.quant_pre_process(float_path, prepared)
        onnxruntime.quantization.quantize_static(
            *(prepared, aside, Reader()),
            **{"quant_format": onnxruntime.quantization.QuantFormat.QDQ, "per_channel": True},
            activation_type=activation_type,
            weight_type=onnxruntime.quantization.QuantType.QInt8,
        )


def export_aotinductor(model: nn.Module, path: Path, threads: Sequence[int] = (1,), size: int = 32) -> None:
    """Compile a float model or a converted graph ahead of time, for one image a call, into packages that need no Python.

    Compiling for one shape lets Inductor pack the weights: with a free batch size (torch 2.14) they are reordered in every
    call, which makes ResNet18 five times slower. oneDNN packs for a number of threads, too: under another one it may copy
    weights into another layout in every call, so each of `threads` gets a package of its own, and `load_predictor` takes
    the one that fits. `path` is the package for the last of them, which serves any other count.
    Raises StudyError when there is no C++ compiler, or with what Inductor said.
    """
    for earlier in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        earlier.unlink()
    before = torch.get_num_threads()
    try:
        with _refused("Inductor does not compile it"), torch.no_grad():
            program = torch.export.export(model, (torch.zeros(1, 3, size, size),))
            for count in threads:
                torch.set_num_threads(count)
                with whole_file(path if count == threads[-1] else _package(path, count)) as aside:
                    aside.unlink()
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(aside), inductor_configs=INDUCTOR
                    )
    finally:
        torch.set_num_threads(before)


def _package(path: Path, threads: int) -> Path:
    return path.with_suffix(f".{threads}{path.suffix}")


def save_openvino(model: "openvino.Model", path: Path) -> None:
    """Write an OpenVINO IR: `path` (.xml) and the .bin beside it. Weights keep their type (the default would halve them)."""
    with whole_file(path) as aside:
        weights = aside.with_suffix(".bin")
        try:
            openvino.save_model(model, aside, compress_to_fp16=False)
            path.unlink(missing_ok=True)  # a graph never stands beside the weights of another one
            weights.replace(path.with_suffix(".bin"))
        finally:
            weights.unlink(missing_ok=True)


@_refused("OpenVINO does not convert it")
def convert_to_openvino(onnx_path: Path, path: Path) -> None:
    """Convert an ONNX file to an OpenVINO IR at `path` (.xml). Raises StudyError with what OpenVINO said when it fails."""
    save_openvino(openvino.convert_model(onnx_path), path)


def quantize_openvino(float_path: Path, images: Tensor, path: Path) -> None:
    """Quantize a float IR with NNCF's post-training quantization, calibrated on `images`, float32 [N, 3, H, W], normalised."""
    model = openvino.Core().read_model(float_path)
    calibration = nncf.Dataset([image.unsqueeze(0).numpy() for image in images])
    save_openvino(nncf.quantize(model, calibration, subset_size=len(images)), path)


@_refused("NNCF's accuracy control does not quantize it")
def quantize_openvino_controlled(
    float_path: Path, images: Tensor, held_out: tuple[Tensor, Tensor], path: Path, max_drop: float = 0.005
) -> None:
    """The same with accuracy control: layers go back to float until at most `max_drop` of accuracy (in [0, 1]) is lost.

    held_out: validation images, float32 [N, 3, H, W], normalised, and labels [N], that decide: all are scored after each
    layer that goes back, and as many as there are calibration images rank the layers. Few images let chance decide.
    Raises StudyError with what NNCF said when it fails.
    """
    pictures, labels = held_out[0].numpy(), held_out[1].numpy()

    def score(compiled: "openvino.CompiledModel", chosen: Iterable[int]) -> tuple[float, list[float]]:
        right = [float(compiled(pictures[i : i + 1])[0].argmax() == labels[i]) for i in chosen]
        return sum(right) / len(right), right

    model = openvino.Core().read_model(float_path)
    quantized = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf.Dataset([image.unsqueeze(0).numpy() for image in images]),
        validation_dataset=nncf.Dataset(list(range(len(labels)))),
        validation_fn=score,
        max_drop=max_drop,
        subset_size=len(images),
    )
    save_openvino(quantized, path)


def prepare_qat_nncf(model: nn.Module, images: Tensor) -> nn.Module:
    """FakeQuantize by NNCF in a copy of a float PyTorch model, ranges from `images`, float32 [N, 3, H, W]; train it further.

    NNCF compiles an extension when the model is first called, on a GPU another one: that is done here, where `fit` will
    train, so that what cannot be trained is refused before the training. Raises StudyError with the reason.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise StudyError("NNCF's QAT found no C++ compiler; install g++ (Debian: apt-get install g++).")
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # a slow machine needs more than its 60 s
    calibration = nncf.Dataset([image.unsqueeze(0) for image in images])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _refused(f"NNCF's QAT does not run on this machine's {device}"), torch.no_grad():
        prepared = nncf.quantize(copy.deepcopy(model).eval(), calibration, subset_size=len(images))
        prepared.to(device)(images[:1].to(device))
    return prepared.to("cpu")


@_refused("OpenVINO does not convert it")
def export_qat_nncf(model: nn.Module, path: Path, size: int = 32) -> None:
    """Convert a model that `prepare_qat_nncf` made to an OpenVINO IR at `path` (.xml). Raises StudyError when that fails."""
    with warnings.catch_warnings():  # tracing compares two runs of a rounding function and finds ties broken otherwise
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        shape = openvino.PartialShape([-1, 3, size, size])
        converted = openvino.convert_model(model.eval(), example_input=torch.zeros(1, 3, size, size), input=shape)
    save_openvino(converted, path)


def artifact_bytes(path: Path) -> int:
    """Size of a model on disk: the file, and for an OpenVINO IR its .bin too."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def stored_weight_bytes(path: Path) -> int:
    """Bytes of the weights and constants in an exported file, after the exporter's folding: an .onnx or an OpenVINO .xml.

    Raises StudyError for a file of another kind.
    """
    if path.suffix == ".xml":
        return path.with_suffix(".bin").stat().st_size
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        constants = [
            a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")
        ]
        return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in (*graph.initializer, *constants))
    raise StudyError(f"{path} is neither .onnx nor .xml; the weights of other files are counted in their model.")


def load_predictor(path: Path, runtime: str, threads: int = 0, engine: str = "fbgemm") -> Predictor:
    """Load a model file into a runtime: f(images float32 [N, 3, 32, 32]) -> logits float32 [N, 10], numpy arrays.

    threads: of this runtime, 0 for its own default; PyTorch's count holds for the whole process, so load together what
    shares a count. engine: whose INT8 kernels eager and TorchScript use. OpenVINO computes in float32 where the model is
    float, also where the CPU has bfloat16, and `openvino_bf16` asks for that. Shapes are fixed inside: the first call with a
    new N compiles for it. What is in ONE_IMAGE_A_CALL answers a batch image by image: not to be timed beside batches.
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
            quantization.set_engine(engine)
            return module_predictor(torch.jit.load(path))
        if runtime == "inductor":
            return _inductor(load_arm(path))
        if runtime == "aotinductor":
            return _aotinductor(path, threads or torch.get_num_threads())
        return _onnxruntime(path, threads) if runtime == "onnxruntime" else _openvino(path, threads, runtime)
    except StudyError:
        raise
    except Exception as error:  # each runtime has its own exceptions for a file it cannot read
        first_line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise StudyError(f"{runtime} cannot read {path} ({first_line}); if it is damaged, make it again.") from error


def _inductor(model: nn.Module) -> Predictor:
    if _is_eager_int8(model):
        raise StudyError("Inductor does not take eager-mode INT8 models; quantize with PT2E for it.")
    import torch._inductor.config

    from helpers.pt2e import export_graph  # with torchao it takes seconds to import, and most runs do without

    # A graph has compiled code of its own; instances of one class would share theirs, and Dynamo gives up after a few.
    graph = model if isinstance(model, torch.fx.GraphModule) else export_graph(model)
    torch._inductor.config.load_config(
        torch._inductor.config.get_config_copy() | INDUCTOR
    )  # `options` come too late to freeze
    compiled = module_predictor(torch.compile(graph, dynamic=False))

    def predictor(images: np.ndarray) -> np.ndarray:
        with _refused("Inductor does not compile it"):
            return compiled(images)

    return predictor


def _aotinductor(path: Path, threads: int) -> Predictor:
    fitting = _package(path, threads)
    package = torch._inductor.aoti_load_package(str(fitting if fitting.exists() else path))

    def predictor(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([package(torch.from_numpy(images[i : i + 1])).numpy() for i in range(len(images))])

    return predictor


def _onnxruntime(path: Path, threads: int) -> Predictor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _openvino(path: Path, threads: int, runtime: str) -> Predictor:
    core = openvino.Core()
    model = core.read_model(path)
    if runtime == "openvino_bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise StudyError("This CPU has no bfloat16 instructions; OpenVINO would compute in float32 instead.")
    requests: dict[int, tuple[openvino.InferRequest, np.ndarray, np.ndarray]] = {}

    def predictor(images: np.ndarray) -> np.ndarray:
        n = len(images)
        if n not in requests:
            request = compile_openvino(model, n, threads, runtime).create_infer_request()
            # Its own tensors, asked for once: a dictionary of inputs, or asking in every call, takes a tenth and a
            # fortieth of ResNet18's INT8 latency.
            requests[n] = request, request.get_input_tensor().data, request.get_output_tensor().data
        request, taken, given = requests[n]
        np.copyto(taken, images)
        request.infer()
        return given.copy()

    return predictor


def compile_openvino(
    model: "openvino.Model", batch: int, threads: int = 0, runtime: str = "openvino", **config: object
) -> "openvino.CompiledModel":
    """Compile a copy of a model for one batch size, for latency; threads: 0 for OpenVINO's own choice.

    runtime: openvino (float32 where the model is float) or openvino_bf16; config: more of OpenVINO's properties.
    """
    fixed = model.clone()
    fixed.reshape([batch, *list(model.input(0).partial_shape)[1:]])
    precision = "bf16" if runtime == "openvino_bf16" else "f32"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    return openvino.Core().compile_model(fixed, "CPU", hints | config)


def first_call(path: Path, runtime: str, images: np.ndarray, engine: str = "fbgemm", tries: int = 3) -> float:
    """Milliseconds from a model file to its first answer to `images`: loading, compiling, one call; the median of `tries`.

    A try before them is not timed, so the runtime is imported, it has set itself up in this process and the file is in
    memory: this is what one more model costs, not what a new process pays. Inductor compiles for so long that it has a
    single try and none before it, with an empty cache of what it compiled; import it before, by another use.
    Raises StudyError as `load_predictor` does.
    """
    from torch._inductor.utils import fresh_cache

    def one_try() -> float:
        started = time.perf_counter()
        predictor = load_predictor(path, runtime, engine=engine)
        with fresh_cache() if runtime == "inductor" else nullcontext(), _refused(f"{runtime} does not run it"):
            predictor(images)
            return 1e3 * (time.perf_counter() - started)

    if runtime == "inductor":
        return one_try()
    one_try()
    return float(np.median([one_try() for _ in range(tries)]))


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
    compiled = compile_openvino(openvino.Core().read_model(path), 1)
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
