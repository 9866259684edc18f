"""PTQ and QAT by NNCF, OpenVINO's tool: the only importer of nncf.

Source: https://docs.openvino.ai/2026/openvino-workflow/model-optimization.html
"""

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.files import StudyError, refused
from helpers.ir import read_openvino, save_openvino
from helpers.quantize.ranges import TAIL

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF looks for CUDA; this is about CPUs
import nncf  # noqa: E402
import openvino  # noqa: E402

nncf.set_log_level("ERROR")
# NNCF draws its progress bars with a widget library that the study does not need.
warnings.filterwarnings("ignore", message='install "ipywidgets" for Jupyter support')


# Where the range of an activation comes from. The first is NNCF's own choice: the mean over images of their extremes.
RANGES = ("mean", "minmax", "median")
# The nearest that NNCF has to `ranges.range_of_most`: the mean over images without the most extreme 5 % of them at either end.
MOST_IMAGES = "most_images"


@refused("NNCF does not quantize it")
def quantize_openvino(
    float_path: Path,
    images: Tensor,
    path: Path,
    ranges: str = "mean",
    preset: str = "performance",
    bias_correction: str = "fast",
    smooth_quant: bool = True,
    overflow_fix: str = "",
) -> None:
    """Quantize a float IR with NNCF's post-training quantization, calibrated on `images`, float32 [N, 3, H, W], normalised.

    The defaults are NNCF's own. ranges: one of RANGES or MOST_IMAGES: the mean or the median over images of an activation's
    smallest and largest value, or the extremes of all images. preset: performance (activations symmetric) or mixed (they
    have a zero-point). bias_correction: fast, accurate or none. smooth_quant: of matrix products. overflow_fix: whose weights
    get 7 bits, so that 16-bit sums do not saturate on CPUs without VNNI: enable (all), disable (none), or empty for NNCF's own
    choice, the first layer's. Raises StudyError with what NNCF said when it fails.
    """
    model = read_openvino(float_path)
    calibration = nncf.Dataset([image.unsqueeze(0).numpy() for image in images])
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix(overflow_fix) if overflow_fix else None,
        disable_bias_correction=bias_correction == "none",
    )
    if ranges != RANGES[0]:
        advanced.activations_range_estimator_params = _range_estimator(ranges)
    if not smooth_quant:
        advanced.smooth_quant_alphas.matmul = -1
    options = {"preset": nncf.QuantizationPreset(preset), "fast_bias_correction": bias_correction != "accurate"}
    quantized = nncf.quantize(model, calibration, subset_size=len(images), advanced_parameters=advanced, **options)
    save_openvino(quantized, path)


def _range_estimator(ranges: str) -> "nncf.quantization.range_estimator.RangeEstimatorParameters":
    estimators = nncf.quantization.range_estimator
    if ranges != MOST_IMAGES:
        known = estimators.RangeEstimatorParametersSet
        return {"minmax": known.MINMAX, "median": known.MEDIAN_MINMAX}[ranges]
    kept = {"aggregator_type": estimators.AggregatorType.MEAN_NO_OUTLIERS, "quantile_outlier_prob": TAIL}
    ends = (estimators.StatisticsType.MIN, estimators.StatisticsType.MAX)
    return estimators.RangeEstimatorParameters(
        *(estimators.StatisticsCollectorParameters(statistics_type=end, **kept) for end in ends)
    )


@refused("NNCF's accuracy control does not quantize it")
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

    model = read_openvino(float_path)
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
    with refused(f"NNCF's QAT does not run on this machine's {device}"), torch.no_grad():
        prepared = nncf.quantize(copy.deepcopy(model).eval(), calibration, subset_size=len(images))
        prepared.to(device)(images[:1].to(device))
    return prepared.to("cpu")


@refused("OpenVINO does not convert it")
def export_qat_nncf(model: nn.Module, path: Path, size: int = 32) -> None:
    """Convert a model that `prepare_qat_nncf` made to an OpenVINO IR at `path` (.xml). Raises StudyError when that fails."""
    with warnings.catch_warnings():  # tracing compares two runs of a rounding function and finds ties broken otherwise
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        shape = openvino.PartialShape([-1, 3, size, size])
        converted = openvino.convert_model(model.eval(), example_input=torch.zeros(1, 3, size, size), input=shape)
    save_openvino(converted, path)
