"""PTQ by ONNX Runtime's static quantization."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization
from torch import Tensor

from helpers.files import check_whole, refused, seal, whole_file

UNSIGNED = onnxruntime.quantization.QuantType.QUInt8  # what x86 kernels multiply fastest with signed weights


def onnx_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What a caller must give an ONNX model: its inputs but those that are weights."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


@refused("ONNX Runtime does not quantize it")
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
    check_whole(float_path)
    (wanted,) = onnx_inputs(onnx.load(float_path, load_external_data=False))
    together = wanted.type.tensor_type.shape.dim[0].dim_value or 64  # where the file fixes its batch, only that many

    class Reader(onnxruntime.quantization.CalibrationDataReader):
        batches = iter(images[: len(images) // together * together or len(images)].split(together))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {wanted.name: batch.numpy()}

    with whole_file(path) as aside, tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        onnxruntime.quantization.quant_pre_process(float_path, prepared)
        onnxruntime.quantization.quantize_static(
            *(prepared, aside, Reader()),
            **{"quant_format": onnxruntime.quantization.QuantFormat.QDQ, "per_channel": True},
            activation_type=activation_type,
            weight_type=onnxruntime.quantization.QuantType.QInt8,
        )
        seal(aside)
