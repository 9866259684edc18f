"""What really runs in INT8: the graph that a runtime executes, after its own optimisation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from helpers.files import StudyError, check_whole, whole_file
from helpers.ir import read_openvino
from helpers.serve.profiling import torch_ops
from helpers.serve.sessions import compile_openvino
from helpers.train.models import Predictor


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
    compiled = compile_openvino(read_openvino(path), 1)
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
    check_whole(path)
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


def inductor_layers(predictor: Predictor, images: np.ndarray) -> list[dict[str, str]]:
    """The same for a model that Inductor compiled, by the kernels that one call runs: torch's profiler sees them.

    predictor: of `runtimes.inductor_predictor`; images: float32 [N, 3, H, W]. Kernels do not know their layer, so `layer` is empty.
    A linear layer that becomes code of Inductor's own, as it may for one image, is not among them.
    """
    return [
        {"layer": "", "type": kind, "precision": precision, "kernel": op["op"]}
        for op in torch_ops(predictor, images, calls=1)
        if op["op"] in _INDUCTOR_KERNELS
        for kind, precision in [_INDUCTOR_KERNELS[op["op"]]] * op["count"]
    ]


# Outermost operators only: aten::convolution and what it calls would count a layer twice.
_INDUCTOR_KERNELS = {
    "onednn::qconv_pointwise": ("convolution", "int8"),
    "onednn::qconv2d_pointwise": ("convolution", "int8"),
    "onednn::qlinear_pointwise": ("linear", "int8"),
    "onednn::qconv2d_pointwise.binary": ("convolution", "int8"),
    "mkldnn::_convolution_pointwise": ("convolution", "float32"),
    "mkldnn::_convolution_pointwise_": ("convolution", "float32"),
    "aten::convolution": ("convolution", "float32"),
    "mkldnn::_linear_pointwise": ("linear", "float32"),
    "mkl::_mkl_linear": ("linear", "float32"),
    "aten::addmm": ("linear", "float32"),
    "aten::mm": ("linear", "float32"),
}
