"""Where the time of a call goes: the machine's ceilings, the work of each layer, and what the runtimes' own profilers see."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import pandas as pd
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from helpers.files import StudyError
from helpers.ir import read_openvino
from helpers.quantize.arms import ENGINES
from helpers.serve.runtimes import load_predictor
from helpers.serve.sessions import compile_openvino
from helpers.train.models import Predictor, run_hooked
from helpers.train.taps import live_taps

# The library under torch's profiler looks for GPUs, and says at every start that there are none; this is about CPUs.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# Ops of PyTorch that allocate, reshape or look something up: inside a kernel they do not make it a wrapper.
_BOOKKEEPING = re.compile(
    r"aten::(empty|view|resize|as_strided|expand|t$|transpose|reshape|flatten|detach|copy_|to$|_to_copy|resolve_|lift_fresh"
    r"|q_|qscheme|_empty_affine|item|_local_scalar|contiguous|clone|_nnpack_available|fill_|zero)"
)


def layer_costs(model: nn.Module, input_size: int) -> list[dict[str, Any]]:
    """Work of each convolution and linear layer for one image, counted from shapes; one row a layer, in order of execution.

    model: float; input_size: height and width of the images in pixels. Rows have layer; macs: multiply-accumulates as the
    textbook counts them, padding included; useful_macs: those that multiply a pixel and not padding; weights, and
    useful_weights without the taps that `trim_dead_taps` can cut; activations: elements read and written. Batch norm,
    ReLU, additions and pooling are not counted: runtimes merge them into the convolutions. Raises StudyError if
    input_size < 1 or the model has no such layer.
    """
    if input_size < 1:
        raise StudyError(f"input_size is {input_size}; give the height and width of the images in pixels, at least 1.")
    rows: list[dict[str, Any]] = []

    def count(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows.append({"layer": name, **_work(layer, inputs[0], output)})

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    if not layers:
        raise StudyError("The model has no float convolution or linear layer to count; give it before it is quantized.")
    image = torch.zeros(1, 3, input_size, input_size)
    run_hooked(model.eval(), image, (module.register_forward_hook(count(name)) for name, module in layers))
    return rows


def _work(layer: nn.Module, image: Tensor, output: Tensor) -> dict[str, int]:
    weights, activations = layer.weight.numel(), image.numel() + output.numel()
    if isinstance(layer, nn.Linear):
        return {
            **{"macs": weights, "useful_macs": weights, "weights": weights, "useful_weights": weights},
            **{"activations": activations},
        }
    spatial = (image.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    dimensions = list(zip(*spatial, strict=True))
    pairs = weights // np.prod(layer.kernel_size)  # of an input and an output channel
    touched = [touched_taps(*dimension) for dimension in dimensions]
    kept = [last + 1 - first for first, last in (live_taps(*dimension) for dimension in dimensions)]
    return {
        "macs": int(weights * output[0, 0].numel()),
        "useful_macs": int(pairs * np.prod(touched)),
        "weights": weights,
        "useful_weights": int(pairs * np.prod(kept)),
        "activations": activations,
    }


def touched_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many pairs of an output and a tap of a convolution meet a pixel, not padding, along one dimension of `size` pixels."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    places = (stride * out - padding + dilation * tap for out in range(outputs) for tap in range(kernel))
    return sum(0 <= place < size for place in places)


def floor_ms(macs: np.ndarray, bytes_: np.ndarray, gmacs: float, gbs: float) -> np.ndarray:
    """Least time of each layer in ms under a roofline: the longer one of computing and of moving its bytes once.

    macs, bytes_: numbers [layers]; gmacs: ceiling of arithmetic in 10^9 multiply-accumulates a second; gbs: of memory, in
    10^9 bytes a second. Source: Williams, Waterman, Patterson, CACM 52(4), 2009. Raises ValueError if a ceiling is not positive.
    """
    if gmacs <= 0 or gbs <= 0:
        raise ValueError(f"ceilings of {gmacs} GMAC/s and {gbs} GB/s: both must be positive")
    return 1e3 * np.maximum(np.asarray(macs) / (1e9 * gmacs), np.asarray(bytes_) / (1e9 * gbs))


def layer_floors(
    costs: pd.DataFrame, batch: int, element_bytes: int, gmacs: float, reading: pd.Series, useful: bool = False
) -> pd.Series:
    """The `floor_ms` of each layer of one call, by layer.

    costs: rows of `layer_costs`, indexed by layer. element_bytes: of a weight or an activation, 4 or 1. gmacs: as in
    `floor_ms`. reading: 10^9 bytes a second by the bytes of what is read again and again, as measured; it is interpolated
    on a logarithmic axis for the working set of the model. useful: count only what touches data, not padding.
    """
    macs, weights = (costs[f"useful_{column}" if useful else column] for column in ("macs", "weights"))
    moved = element_bytes * (weights + batch * costs.activations)
    never_slower = reading.sort_index()[::-1].cummax()[::-1]  # less data is never slower to read
    gbs = float(np.interp(np.log(moved.sum()), np.log(never_slower.index), never_slower))
    return pd.Series(floor_ms(batch * macs, moved, gmacs, gbs), costs.index)


def rates(call: Callable[[], Any], amount: int, tries: int = 30) -> dict[str, float]:
    """How much of `amount` a call does in a second, in 10^9: the best of `tries` and their median."""
    seconds = time_calls(call, tries)
    return {"best": amount / seconds.min() / 1e9, "median": amount / float(np.median(seconds)) / 1e9}


def time_calls(call: Callable[[], Any], repeats: int) -> np.ndarray:
    """Seconds that each of `repeats` calls took, float64 [repeats], after two that are not timed."""
    call(), call()
    seconds = np.empty(repeats)
    for turn in range(repeats):
        started = time.perf_counter()
        call()
        seconds[turn] = time.perf_counter() - started
    return seconds


def memory_traffic(size: int, triad: bool = False) -> tuple[Callable[[], Any], int]:
    """A call that goes once through `size` bytes of float32, and how many bytes it moves.

    It reads one array (what inference does with weights), or with `triad` computes a = b + 3 c of STREAM (McCalpin 1995)
    on three arrays that take `size` bytes together. Raises ValueError if size < 12.
    """
    if size < 12:
        raise ValueError(f"{size} bytes: at least 12 are needed")
    if not triad:
        array = torch.ones(size // 4)
        return array.sum, 4 * len(array)
    a, b, c = torch.ones(3, size // 12)
    return lambda: torch.add(b, c, alpha=3, out=a), 12 * len(a)


def products(threads: int, bfloat16: bool = False) -> dict[tuple[str, str], tuple[Callable[[], Any], int]]:
    """Large matrix products and convolutions of several libraries: (precision, library) -> (call, multiply-accumulates).

    precision: float32, bfloat16 (only if asked for) or int8; the fastest of a precision is what this machine can do.
    threads: of PyTorch, for the whole process, and of OpenVINO.
    """
    torch.set_num_threads(threads)
    n, channels, size = 512, 128, 28
    a, b = torch.rand(2, n, n, generator=torch.Generator().manual_seed(0))
    small, weight = ((127 * x).to(torch.int8) for x in (a, b))
    image, kernel = torch.rand(1, channels, size, size), torch.rand(channels, channels, 3, 3)
    pixels = image.contiguous(memory_format=torch.channels_last)
    conv_macs = size * size * channels * channels * 9
    calls = {
        ("float32", "torch.matmul"): (lambda: a @ b, n**3),
        ("float32", "torch.conv2d"): (lambda: torch.conv2d(pixels, kernel, padding=1), conv_macs),
        ("int8", "torch._int_mm"): (lambda: torch._int_mm(small, weight), n**3),
    }
    if bfloat16:
        low, other = a.bfloat16(), b.bfloat16()
        calls["bfloat16", "torch.matmul"] = (lambda: low @ other, n**3)
    for engine in ENGINES:
        calls["int8", f"torch quantized linear, {engine}"] = (_quantized_linear(a, b, engine), n**3)
    for precision in ("float32", "int8"):
        request = _openvino_convolutions(channels, size, precision == "int8", threads)
        calls[precision, "OpenVINO convolution"] = (request.infer, 4 * conv_macs)
    return calls


def _quantized_linear(a: Tensor, b: Tensor, engine: str) -> Callable[[], Any]:
    torch.backends.quantized.engine = engine
    weight = torch.quantize_per_tensor(b, 1 / 127, 0, torch.qint8)
    inputs = torch.quantize_per_tensor(a, 1 / 127, 0, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(inputs, packed, 1.0, 0)


def _openvino_convolutions(channels: int, size: int, int8: bool, threads: int) -> "openvino.InferRequest":
    """Four 3x3 convolutions after one another."""
    images = ops.parameter([1, channels, size, size], np.float32)
    generator = np.random.default_rng(0)
    low, high = np.float32(0), np.float32(2.55)
    value = ops.fake_quantize(images, low, high, low, high, 256) if int8 else images
    for _ in range(4):
        weight = ops.constant(generator.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8))
        scale = ops.constant(np.full((channels, 1, 1, 1), 1e-2, np.float32))
        product = ops.multiply(ops.convert(weight, np.float32), scale)
        value = ops.convolution(value, product, [1, 1], [1, 1], [1, 1], [1, 1])
        value = ops.fake_quantize(value, low, high, low, high, 256) if int8 else value
    return compile_openvino(openvino.Model([value], [images]), 1, threads).create_infer_request()


def openvino_nodes(
    path: Path, images: np.ndarray, threads: int, calls: int = 100, repeats: int = 5
) -> list[dict[str, Any]]:
    """Time of each node that OpenVINO executes, by its own performance counters; one row a node, in order of execution.

    path: an IR (.xml); images: float32 [N, 3, H, W]. Rows have layer (in PyTorch's name where it is a convolution or the
    classifier, else OpenVINO's), type, kernel (OpenVINO's word for it) and ms. The counters are means since compilation in
    whole microseconds, cut, so a node may take up to 1 us more; the model is compiled `repeats` times, called `calls` times
    each, and the compilation whose nodes take least together counts: the one that other work disturbed least. Each node at
    its own least would add up to less than any call took. Counting itself slows a call.
    """
    model = read_openvino(path)
    compilations = []
    for _ in range(repeats):
        request = compile_openvino(model, len(images), threads, PERF_COUNT=True).create_infer_request()
        np.copyto(request.get_input_tensor().data, images)
        for _ in range(calls):
            request.infer()
        compilations.append(
            [
                {
                    **{"layer": pytorch_name(node.node_name, node.node_type), "type": node.node_type},
                    **{"kernel": node.exec_type, "ms": 1e3 * node.real_time.total_seconds()},
                }
                for node in request.profiling_info
                if node.status == openvino.ProfilingInfo.Status.EXECUTED
            ]
        )
    return min(compilations, key=_total_ms)


def _total_ms(rows: list[dict[str, Any]]) -> float:
    return sum(row["ms"] for row in rows)


def pytorch_name(node: str, kind: str) -> str:
    """PyTorch's name of the layer that an OpenVINO node of this study's ResNets stands for, by its name and type.

    layer1.0.conv1/WithoutBiases, and of a file that the TorchScript-based exporter wrote
    /layer1/layer1.0/conv1/Conv/WithoutBiases or /layer1/0/conv1/Conv/WithoutBiases: all are layer1.0.conv1.
    """
    if kind.startswith("FullyConnected"):
        return "fc"
    if kind != "Convolution":
        return node
    parts = node.removesuffix("/WithoutBiases").strip("/").split("/Conv")[0].split("/")
    return ".".join(part.removeprefix(f"{before}.") for before, part in zip(["", *parts], parts, strict=False))


def torch_ops(predictor: Predictor, images: np.ndarray, calls: int = 10) -> list[dict[str, Any]]:
    """Self time of each PyTorch operator in one call, by torch's profiler: rows with op, kernel, count and ms.

    kernel: whether the op computes, that is calls no other op but allocations, views and copies; the others are wrappers.
    predictor: of an eager or TorchScript model; images: float32 [N, 3, H, W]. Of `calls` calls, each profiled alone, the one
    whose operators take least together counts. The profiler itself slows every op by about a microsecond.
    """
    predictor(images), predictor(images)
    profiled = []
    for _ in range(calls):
        with torch.autograd.profiler.profile() as profile:
            predictor(images)
        rows: dict[tuple[str, bool], dict[str, Any]] = {}
        for event in profile.function_events:
            kernel = not _BOOKKEEPING.match(event.name) and all(_BOOKKEEPING.match(c.name) for c in event.cpu_children)
            empty = {"op": event.name, "kernel": kernel, "count": 0, "ms": 0.0}
            row = rows.setdefault((event.name, kernel), empty)
            row["count"] += 1
            row["ms"] += 1e-3 * event.self_cpu_time_total
        profiled.append(list(rows.values()))
    return sorted(min(profiled, key=_total_ms), key=lambda row: -row["ms"])


def onednn_events(verbose: str) -> dict[str, tuple[int, float]]:
    """Sum up what oneDNN wrote with its verbose mode: "exec convolution", "create reorder" ... -> (count, milliseconds).

    verbose: lines as `torch.backends.mkldnn.verbose` lets oneDNN print them; others are passed over. A primitive counts as
    created also where oneDNN found it in its cache: its description was made again to look it up.
    """
    found: dict[str, tuple[int, float]] = {}
    for fields in _onednn_lines(verbose):
        event = f"{fields[3].split(':')[0]} {fields[5]}"
        count, ms = found.get(event, (0, 0.0))
        found[event] = count + 1, ms + float(fields[-1])
    return found


def onednn_reordered(verbose: str) -> set[str]:
    """Shapes of the tensors that oneDNN copied into another layout, such as 512x256x1x1; lines as for `onednn_events`."""
    return {fields[-2] for fields in _onednn_lines(verbose) if fields[3] == "exec" and fields[5] == "reorder"}


def _onednn_lines(verbose: str) -> list[list[str]]:
    lines = (line.split(",") for line in verbose.splitlines() if line.startswith("onednn_verbose"))
    return [fields for fields in lines if len(fields) > 6 and fields[2] == "primitive" and fields[3] != "info"]


def in_fresh_process(
    call: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str] | None = None
) -> tuple[Any, str]:
    """Call a function in a process of its own: what it returned, and what was printed meanwhile.

    call: a function of a module; its arguments and its result must be what JSON holds. environment: added to this one's.
    Raises StudyError with the last line of its error output when it fails.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CALL, call.__module__, call.__name__, json.dumps([*arguments])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    if done.returncode:
        raise StudyError(
            f"A process of this notebook failed ({(done.stderr.strip() or 'no output').splitlines()[-1]})."
        )
    printed, _, returned = done.stdout.rpartition(_RETURNED)
    return json.loads(returned), printed


_RETURNED = "RETURNED "
_CALL = f"""
import importlib, json, sys
module, name, arguments = sys.argv[1:]
returned = getattr(importlib.import_module(module), name)(*json.loads(arguments))
print("\\n{_RETURNED}" + json.dumps(returned))
"""


def batch_change(
    file: Path, engine: str, threads: int, first: int, batch: int, calls: int, cached: bool = True
) -> tuple[dict[str, float], set[str]]:
    """What a call of a TorchScript INT8 file costs after the file has seen another batch size, by oneDNN's own report.

    The file is loaded in a fresh process, gets `first` images three times, then `batch` images `calls` times. engine: of
    quantization.ENGINES. cached: False takes oneDNN's cache of primitives away, so that each creation compiles its kernel.
    Returns milliseconds of the least call (`ms`), of its `kernels`, its copies into another layout (`reorder`) and the
    `rest`, what oneDNN says of creation, how many primitives were `executed`, `created` and were `reorders`; and the shapes
    that were reordered. Raises StudyError when the process fails.
    """
    environment = {} if cached else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    seconds, printed = in_fresh_process(_change_batch, [str(file), engine, threads, first, batch, calls], environment)
    reports = printed.split(_ONE_CALL)[1:]
    events = [onednn_events(report) for report in reports]
    least = {name: np.min([e.get(name, (0, 0)) for e in events], axis=0) for name in set().union(*events)}
    total = {
        start: sum((value for name, value in least.items() if name.startswith(start)), np.zeros(2))
        for start in ("exec", "exec reorder", "create")
    }
    (executed, busy), (reorders, reordering), (created, creating) = total.values()
    ms = 1e3 * min(seconds)
    parts = {"kernels": busy - reordering, "reorder": reordering, "rest": ms - busy, "creation, by oneDNN": creating}
    counts = {"executed": executed, "created": created, "reorders": reorders}
    return {"ms": ms} | parts | counts, set().union(*map(onednn_reordered, reports))


_ONE_CALL = "ONE CALL"


def _change_batch(file: str, engine: str, threads: int, first: int, batch: int, calls: int) -> list[float]:
    """Seconds of each call with `batch` images after three with `first`; then 20 that oneDNN reports about."""
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine
    model = torch.jit.load(file)
    before, images = (torch.zeros(n, 3, 32, 32) for n in (first, batch))
    with torch.inference_mode():
        for _ in range(3):
            model(before)
        model(images)
        seconds = time_calls(lambda: model(images), calls)
        for _ in range(20):
            print(_ONE_CALL, flush=True)
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
                model(images)
    return seconds.tolist()


def capped_logits(
    files: Mapping[str, Path], images: np.ndarray, threads: int, cap: str = ""
) -> tuple[dict[str, np.ndarray], str]:
    """Logits that files give where oneDNN and fbgemm may use no newer instructions than `cap`, and what oneDNN says it uses.

    files: TorchScript (.pt) or OpenVINO (.xml). images: float32 [N, 3, 32, 32]. cap: one of CAPS, empty for none. Returns
    name -> float32 [N, 10], and the words of the oneDNN in PyTorch. Raises StudyError when the process fails.
    """
    environment = dict(zip(("ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS"), CAPS[cap], strict=True)) if cap else {}
    with TemporaryDirectory() as folder:
        np.save(f"{folder}/images.npy", images)
        names = {name: str(file) for name, file in files.items()}
        _, printed = in_fresh_process(_save_logits, [folder, names, threads], environment)
        with np.load(f"{folder}/logits.npz") as stored:
            logits = dict(stored)
    return logits, next((line.split("cpu,isa:")[1] for line in printed.splitlines() if "cpu,isa:" in line), "")


# Neither has VNNI. In the words of oneDNN and of fbgemm.
CAPS = {"AVX2": ("AVX2", "AVX2"), "AVX-512": ("AVX512_CORE", "AVX512")}


def _save_logits(folder: str, files: dict[str, str], threads: int) -> None:
    images = np.load(f"{folder}/images.npy")
    pieces = np.array_split(images, -(-len(images) // 100))
    logits = {}
    for name, file in files.items():
        predictor = load_predictor(Path(file), "openvino" if file.endswith(".xml") else "torchscript", threads)
        logits[name] = np.concatenate([predictor(piece) for piece in pieces])
    np.savez(f"{folder}/logits.npz", **logits)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.conv2d(torch.zeros(2, 16, 32, 32), torch.zeros(16, 16, 3, 3))
