"""ONNX Runtime and OpenVINO, set up to serve. Each is imported where it is used: a process that needs one holds only that one."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers.files import check_whole

if TYPE_CHECKING:
    import onnxruntime
    import openvino


def onnxruntime_session(path: Path, threads: int = 0, **config: str) -> "onnxruntime.InferenceSession":
    """Open an ONNX file; threads: 0 for ONNX Runtime's own choice. config: entries of its session, name -> value.

    Raises StudyError for a damaged file, as far as `files.check_whole` can tell.
    """
    import onnxruntime

    check_whole(path)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compile_openvino(
    model: "openvino.Model", batch: int, threads: int = 0, runtime: str = "openvino", **config: object
) -> "openvino.CompiledModel":
    """Compile a copy of a model for one batch size, for latency; threads: 0 for OpenVINO's own choice.

    runtime: openvino (float32 where the model is float) or openvino_bf16; config: more of OpenVINO's properties.
    """
    import openvino

    fixed = model.clone()
    fixed.reshape([batch, *list(model.input(0).partial_shape)[1:]])
    precision = "bf16" if runtime == "openvino_bf16" else "f32"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    return openvino.Core().compile_model(fixed, "CPU", hints | config)


def openvino_predictor(compiled: "openvino.CompiledModel") -> Callable[[np.ndarray], np.ndarray]:
    """A predictor for batches of the compiled size, with a request of its own: one thread at a time may call it."""
    request = compiled.create_infer_request()
    # Its own tensors, asked for once: a dictionary of inputs, or asking in every call, takes a tenth and a fortieth of
    # ResNet18's INT8 latency.
    taken, given = request.get_input_tensor().data, request.get_output_tensor().data

    def predictor(images: np.ndarray) -> np.ndarray:
        np.copyto(taken, images)
        request.infer()
        return given.copy()

    return predictor
