"""PTQ by ONNX Runtime's static quantization."""

import io
import logging
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization
import torch
from torch import Tensor

from helpers.files import check_whole, refused, seal, whole_file
from helpers.quantize.ranges import range_of_most

# It recommends pre-processing each time that there was none; whoever leaves it out does so to see what it is worth.
logging.getLogger().addFilter(lambda record: "pre-processing before quantization" not in record.getMessage())

UNSIGNED = onnxruntime.quantization.QuantType.QUInt8  # what x86 kernels multiply fastest with signed weights


def onnx_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What a caller must give an ONNX model: its inputs but those that are weights."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


# Where the range of an activation comes from. The first is its own choice: the extremes of all images.
METHODS = ("minmax", "percentile", "entropy", "most_images")


@refused("ONNX Runtime does not quantize it")
def quantize_onnxruntime(
    float_path: Path,
    images: Tensor,
    path: Path,
    activation_type: onnxruntime.quantization.QuantType = onnxruntime.quantization.QuantType.QInt8,
    per_channel: bool = True,
    reduce_range: bool = False,
    method: str = METHODS[0],
    pre_process: bool = True,
) -> None:
    """Quantize a float ONNX file by ONNX Runtime's static quantization: QDQ, signed weights.

    images: float32 [N, 3, H, W], normalised, for its calibration. activation_type: QInt8 is its own default; QUInt8 is what
    x86 kernels multiply fastest with signed weights. per_channel: a scale for each output channel of the weights; its own
    default is one a layer. reduce_range: weights of 7 bits. method: one of METHODS, see `range_of_most` for the last.
    pre_process: infer shapes and fuse before, which it recommends. Raises StudyError with what it said when it fails.
    """
    check_whole(float_path)
    (wanted,) = onnx_inputs(onnx.load(float_path, load_external_data=False))
    together = wanted.type.tensor_type.shape.dim[0].dim_value or 64  # where the file fixes its batch, only that many

    class Reader(onnxruntime.quantization.CalibrationDataReader):
        batches = iter(images[: len(images) // together * together or len(images)].split(together))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {wanted.name: batch.numpy()}

    chatter = redirect_stdout(io.StringIO())  # its calibrators print what they do
    with whole_file(path) as aside, tempfile.TemporaryDirectory() as folder, chatter:
        prepared = Path(float_path)
        if pre_process:
            prepared = Path(folder) / "prepared.onnx"
            onnxruntime.quantization.quant_pre_process(float_path, prepared)
        methods = onnxruntime.quantization.CalibrationMethod
        own = {"percentile": methods.Percentile, "entropy": methods.Entropy}.get(method, methods.MinMax)
        extra = {"TensorQuantOverrides": _most_images(prepared, wanted.name, images)} if method == METHODS[-1] else {}
        onnxruntime.quantization.quantize_static(
            *(prepared, aside, Reader()),
            **{"quant_format": onnxruntime.quantization.QuantFormat.QDQ, "per_channel": per_channel},
            **{"reduce_range": reduce_range, "calibrate_method": own, "extra_options": extra},
            activation_type=activation_type,
            weight_type=onnxruntime.quantization.QuantType.QInt8,
        )
        seal(aside)


def _most_images(path: Path, name: str, images: Tensor) -> dict[str, list[dict[str, np.ndarray]]]:
    """ONNX Runtime's overrides that give each activation the range of `ranges.range_of_most`; name: of the input."""
    with tempfile.TemporaryDirectory() as folder:
        calibrator = onnxruntime.quantization.create_calibrator(path, None, f"{folder}/augmented.onnx")
        session = calibrator.infer_session  # answers the extremes of each activation, too
        outputs = [output.name for output in session.get_outputs()]
        found = zip(*(session.run(None, {name: image.numpy()}) for image in images.split(1)), strict=True)
        seen = {
            output: torch.from_numpy(np.concatenate(values).ravel())
            for output, values in zip(outputs, found, strict=True)
        }
    ranges = {}
    for output, lows in seen.items():
        if output.endswith("_ReduceMin"):
            activation = output.removesuffix("_ReduceMin")
            low, high = range_of_most(lows, seen[f"{activation}_ReduceMax"])
            ranges[activation] = [{"rmin": low.numpy(), "rmax": high.numpy()}]
    return ranges
