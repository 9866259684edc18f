"""Everything that executes a model: PyTorch (eager, TorchScript, Inductor), ONNX Runtime and OpenVINO.

Every runtime is reached through `load_predictor`, so what is timed is what was scored.
"""

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import openvino
import torch
from torch import nn

from helpers.files import StudyError, check_whole, first_line, refused
from helpers.ir import read_openvino
from helpers.quantize import arms
from helpers.quantize.arms import is_eager_int8, load_arm
from helpers.serve.export import INDUCTOR, SUFFIXES, package_for
from helpers.serve.sessions import compile_openvino, onnxruntime_session, openvino_predictor
from helpers.train.models import Predictor, module_predictor

RUNTIMES = tuple(SUFFIXES)
# They answer a batch image by image, so their time for more than one image is not that of a batch.
ONE_IMAGE_A_CALL = ("aotinductor",)
# Inductor's tables of the kernels that autotuning tried are for who writes kernels.
SILENT = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}


def load_predictor(path: Path, runtime: str, threads: int = 0, engine: str = "fbgemm", **config: object) -> Predictor:
    """Load a model file into a runtime: f(images float32 [N, 3, 32, 32]) -> logits float32 [N, 10], numpy arrays.

    threads: of this runtime, 0 for its own default; PyTorch's count holds for the whole process, so load together what
    shares a count. engine: whose INT8 kernels eager and TorchScript use. OpenVINO computes in float32 where the model is
    float, also where the CPU has bfloat16, and `openvino_bf16` asks for that. config: more of OpenVINO's properties. Shapes are fixed inside: the first call with a
    new N compiles for it. What is in ONE_IMAGE_A_CALL answers a batch image by image: not to be timed beside batches.
    Raises StudyError for an unknown runtime, or a file that is missing or that the runtime cannot read.
    """
    path = Path(path)
    if runtime not in RUNTIMES:
        raise StudyError(f"runtime is {runtime!r}; allowed are {', '.join(RUNTIMES)}.")
    check_whole(path)
    if threads:
        torch.set_num_threads(threads)
    try:
        if runtime == "eager":
            return module_predictor(load_arm(path, engine))
        if runtime == "torchscript":
            arms.set_engine(engine)
            return module_predictor(torch.jit.load(path))
        if runtime == "inductor":
            return inductor_predictor(load_arm(path))
        if runtime == "aotinductor":
            return _aotinductor(path, threads or torch.get_num_threads())
        return _onnxruntime(path, threads) if runtime == "onnxruntime" else _openvino(path, threads, runtime, **config)
    except StudyError:
        raise
    except Exception as error:  # each runtime has its own exceptions for a file it cannot read
        raise StudyError(
            f"{runtime} cannot read {path} ({first_line(error)}); if it is damaged, make it again."
        ) from error


def inductor_predictor(model: nn.Module, **config: object) -> Predictor:
    """Compile a float model, or a graph (of `pt2e`, or exported for other images than 32x32), in its first call of each batch.

    config: settings of `torch._inductor.config` beside export.INDUCTOR. What is compiled later has the process's own again.
    Raises StudyError for eager-mode INT8, and in the first call when Inductor fails.
    """
    if is_eager_int8(model):
        raise StudyError("Inductor does not take eager-mode INT8 models; quantize with PT2E for it.")
    import torch._inductor.config

    from helpers.quantize.pt2e import export_graph  # with torchao it takes seconds to import, and most runs do without

    # A graph has compiled code of its own; instances of one class would share theirs, and Dynamo gives up after a few.
    graph = model if isinstance(model, torch.fx.GraphModule) else export_graph(model)
    compiled = module_predictor(torch.compile(graph, dynamic=False))
    compiled_for: set[int] = set()

    def predictor(images: np.ndarray) -> np.ndarray:
        if len(images) in compiled_for:
            return compiled(images)
        # `options` of torch.compile come too late to freeze.
        settings = torch._inductor.config.patch(INDUCTOR | SILENT | config)
        with refused("Inductor does not compile it"), settings:
            answer = compiled(images)
        compiled_for.add(len(images))
        return answer

    return predictor


def _aotinductor(path: Path, threads: int) -> Predictor:
    fitting = package_for(path, threads)
    if fitting.exists():
        check_whole(fitting)  # a damaged library would end the process
    package = torch._inductor.aoti_load_package(str(fitting if fitting.exists() else path))

    def predictor(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([package(torch.from_numpy(images[i : i + 1])).numpy() for i in range(len(images))])

    return predictor


def _onnxruntime(path: Path, threads: int) -> Predictor:
    session = onnxruntime_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(path: Path, threads: int, runtime: str, **config: object) -> Predictor:
    model = read_openvino(path)
    if runtime == "openvino_bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise StudyError("This CPU has no bfloat16 instructions; OpenVINO would compute in float32 instead.")
    of_size: dict[int, Predictor] = {}

    def predictor(images: np.ndarray) -> np.ndarray:
        n = len(images)
        if n not in of_size:
            of_size[n] = openvino_predictor(compile_openvino(model, n, threads, runtime, **config))
        return of_size[n](images)

    return predictor


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
        with fresh_cache() if runtime == "inductor" else nullcontext(), refused(f"{runtime} does not run it"):
            predictor(images)
            return 1e3 * (time.perf_counter() - started)

    if runtime == "inductor":
        return one_try()
    one_try()
    return float(np.median([one_try() for _ in range(tries)]))


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
