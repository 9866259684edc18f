"""PTQ by ONNX Runtime's static quantization."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime.quantization
from torch import Tensor

from helpers.files import refused, whole_file


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
