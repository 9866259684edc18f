"""The ways to serve a model of yours: what is made of it for each, its file, what really runs in INT8, and why one cannot be had."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from helpers.files import NotWritten, StudyError, check_whole, refused, seal, whole_file
from helpers.machine import isa_here, sums_saturate
from helpers.quantize.arms import state_bytes
from helpers.quantize.nncf import quantize_openvino
from helpers.quantize.ort import UNSIGNED, quantize_onnxruntime
from helpers.quantize.settings import Setting
from helpers.report.stats import speedup_interval
from helpers.serve.export import artifact_bytes, convert_to_openvino, export_onnx
from helpers.serve.foreign import Foreign
from helpers.serve.inspection import inductor_layers, layers_run_as
from helpers.serve.runtimes import inductor_predictor, load_predictor
from helpers.serve.timing import summarise
from helpers.train.models import Predictor, calibrate, module_predictor

# What was done to the weights, and what runs them; words of report.schema.
WAYS = (
    *(("fp32", "eager"), ("fp32", "eager_channels_last"), ("fp32", "inductor"), ("fp32", "onnxruntime")),
    *(("fp32", "openvino"), ("fp32", "openvino_bf16"), ("ptq_nncf", "openvino"), ("ptq_ort_u8", "onnxruntime")),
    ("ptq_pt2e", "inductor"),
)

Timed = tuple[str, str, int, int, str]  # arm, runtime, threads, batch and pace


@dataclass
class Candidate:
    """One way to serve a model. path or module: what is run; reason: why it cannot be had, empty where it can.

    config: settings of the runtime, OpenVINO's or Inductor's, that are not the study's own.
    """

    arm: str
    runtime: str
    path: Path | None = None
    module: nn.Module | None = None
    reason: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    _loaded: dict[int, Predictor] = field(default_factory=dict, repr=False)

    @property
    def file_bytes(self) -> int:
        """Size of what is shipped: the file; where PyTorch runs it, the weights as `torch.save` writes them."""
        return artifact_bytes(self.path) if self.path else state_bytes(self.module) if self.module else 0

    def predictor(self, threads: int) -> Predictor:
        """Load it, once for each count of threads; PyTorch's count holds for the whole process. Raises StudyError."""
        torch.set_num_threads(threads)
        key = threads if self.path else 0  # what PyTorch runs follows its count
        if key not in self._loaded:
            self._loaded[key] = self._load(threads)
        return self._loaded[key]

    def _load(self, threads: int) -> Predictor:
        if self.path:
            return load_predictor(self.path, self.runtime, threads, **self.config)
        if self.runtime == "inductor":
            return inductor_predictor(self.module, **self.config)
        return _channels_last(self.module) if self.runtime == "eager_channels_last" else module_predictor(self.module)

    def first_call(self, images: np.ndarray, threads: int) -> float:
        """Milliseconds from the model to its first answer, one try; Inductor has an empty cache. Raises StudyError."""
        if self.reason:
            raise StudyError(self.reason)
        if self.path:
            check_whole(self.path)
        with fresh_cache() if self.runtime == "inductor" else nullcontext(), refused("It does not run"):
            started = time.perf_counter()
            self.predictor(threads)(images)
            return 1e3 * (time.perf_counter() - started)

    def layers(self, images: np.ndarray) -> list[dict[str, str]]:
        """What is executed for each convolution and linear layer, see `inspection.layers_run_as`; eager FP32 has no question."""
        if self.path:
            return layers_run_as(self.path, self.runtime.removesuffix("_bf16"))
        return inductor_layers(self.predictor(torch.get_num_threads()), images) if self.runtime == "inductor" else []


def make_candidate(arm: str, runtime: str, model: Foreign, folder: Path, images: Tensor) -> Candidate:
    """Make what one of WAYS needs: files in `folder`, shared with other ways, or a module.

    images: float32 [N, 3, H, W], normalised, for the calibration of INT8. What a tool refuses comes back with its reason; a
    file that cannot be written raises NotWritten.
    """
    if runtime in _OF_PYTORCH:
        return _kept(Candidate(arm, runtime), module=lambda: _OF_PYTORCH[runtime](arm, model, images))
    return _kept(Candidate(arm, runtime), path=lambda: _OF_FILES[arm, runtime](model, folder, images))


def make_setting(setting: Setting, model: Foreign, folder: Path, images: Tensor) -> Candidate:
    """Make what one of SETTINGS says, as `make_candidate` does; settings that differ in `config` only share a file."""
    candidate = Candidate(setting.name, setting.runtime, config=setting.config)
    if setting.runtime == "inductor":
        return _kept(candidate, module=lambda: _graph(setting.name, model, images, **setting.arguments))
    quantize, suffix = {
        "onnxruntime": (quantize_onnxruntime, ".onnx"),
        "openvino": (quantize_openvino, ".xml"),
    }[setting.runtime]
    path = folder / f"{setting.file_name}{suffix}"

    def made() -> Path:
        of = float_onnx(model, folder) if suffix == ".onnx" else float_openvino(model, folder)
        if not path.exists():
            quantize(of, images[: setting.images or None], path, **setting.arguments)
        return path

    return _kept(candidate, path=made)


def _kept(candidate: Candidate, **make: Callable[[], Any]) -> Candidate:
    """The candidate with what `make` makes of it, path or module, or with the reason why that was refused."""
    try:
        return replace(candidate, **{name: made() for name, made in make.items()})
    except NotWritten:
        raise
    except StudyError as error:
        return replace(candidate, reason=str(error))


def float_onnx(model: Foreign, folder: Path) -> Path:
    """The float model as ONNX in `folder`, all in one file. Raises StudyError when the exporter fails."""
    path = folder / "fp32.onnx"
    if not path.exists() and model.module is not None:
        export_onnx(model.module, path, model.size, model.batch)
    elif not path.exists():
        with whole_file(path) as aside:
            onnx.save(onnx.load(model.path), aside)
            seal(aside)
    return path


def float_openvino(model: Foreign, folder: Path) -> Path:
    """The float model as an OpenVINO IR in `folder`. Raises StudyError when it is not converted."""
    path = folder / "fp32.xml"
    if not path.exists():
        convert_to_openvino(float_onnx(model, folder), path)
    return path


def latency_rows(
    model: Foreign, machine: str, times: Mapping[Timed, np.ndarray], reference: tuple[str, str], seed: int
) -> list[dict[str, Any]]:
    """Rows of yours_latency; speed-ups are over `reference`, an arm and its runtime, under the same conditions.

    times: (arm, runtime, threads, batch, pace) -> ms of each round, float64 [rounds], paired by round. seed: of the intervals.
    """
    rows = []
    for (arm, runtime, threads, batch, pace), ms in times.items():
        baseline = times[*reference, threads, batch, pace]
        low, high = speedup_interval(baseline, ms, seed)
        row = {"model": model.name, "arm": arm, "runtime": runtime, "threads": threads, "batch": batch}
        row |= {"size": model.size, "pace": pace, "rounds": len(ms), **summarise(ms), "machine": machine}
        row |= {"speedup": float(np.median(baseline) / np.median(ms)), "speedup_low": low, "speedup_high": high}
        rows.append(row)
    return rows


def answers(predictor: Predictor, images: np.ndarray, batch: int) -> np.ndarray:
    """Logits float32 [n, classes] of images float32 [n, 3, H, W], `batch` of them in a call. Raises StudyError with what failed."""
    with refused("It does not run"):
        return np.concatenate([predictor(images[start : start + batch]) for start in range(0, len(images), batch)])


def _module(model: Foreign) -> nn.Module:
    if model.module is None:
        raise StudyError("An ONNX file holds no PyTorch model.")
    return model.module


def _channels_last(module: nn.Module) -> Predictor:
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)

    def predictor(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images).contiguous(memory_format=torch.channels_last)).numpy()

    return predictor


def _eager(_: str, model: Foreign, __: Tensor) -> nn.Module:
    return _module(model)


@refused("PyTorch does not export or quantize it")
def _graph(arm: str, model: Foreign, images: Tensor, **arguments: Any) -> nn.Module:
    from helpers.quantize import pt2e  # with torchao it takes seconds to import

    module = _module(model)
    if arm == "fp32":
        return pt2e.export_graph(module, model.size, model.batch)
    prepared = pt2e.prepare_pt2e(module, model.size, model.batch, **arguments)
    calibrate(prepared, images, model.batch or 16)
    return pt2e.convert_pt2e(prepared)


def _nncf(model: Foreign, folder: Path, images: Tensor) -> Path:
    quantize_openvino(float_openvino(model, folder), images, folder / "ptq_nncf.xml")
    return folder / "ptq_nncf.xml"


def _ort_u8(model: Foreign, folder: Path, images: Tensor) -> Path:
    path = folder / "ptq_ort_u8.onnx"
    quantize_onnxruntime(float_onnx(model, folder), images, path, UNSIGNED, reduce_range=sums_saturate(isa_here()))
    return path


_OF_PYTORCH: dict[str, Callable[[str, Foreign, Tensor], nn.Module]] = {
    "eager": _eager,
    "eager_channels_last": _eager,
    "inductor": lambda arm, model, images: _graph(arm, model, images, reduce_range=sums_saturate(isa_here())),
}
_OF_FILES: dict[tuple[str, str], Callable[[Any, Any, Any], Path]] = {
    ("fp32", "onnxruntime"): lambda model, folder, _: float_onnx(model, folder),
    ("fp32", "openvino"): lambda model, folder, _: float_openvino(model, folder),
    ("fp32", "openvino_bf16"): lambda model, folder, _: float_openvino(model, folder),
    ("ptq_nncf", "openvino"): _nncf,
    ("ptq_ort_u8", "onnxruntime"): _ort_u8,
}
