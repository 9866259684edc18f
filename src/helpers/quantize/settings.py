"""Settings of the tools that quantize: each tool as it comes, one change at a time, and a few changes together.

What is measured of them is notebook 19's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helpers.quantize.nncf import MOST_IMAGES
from helpers.quantize.ort import UNSIGNED
from helpers.report.schema import TOOLS


@dataclass(frozen=True)
class Setting:
    """One way to use a tool. Names are unique.

    tool: of schema.TOOLS. name: the tool and what is changed. code: the line of the tool's own API that sets it; empty for the tool
    as it comes. arguments: of `quantize_onnxruntime`, `prepare_pt2e` or `quantize_openvino`, in which the tool's own defaults
    must be said where the study's differ. images: how many of the calibration images are used; 0: all. config: of the runtime.
    """

    tool: str
    name: str
    code: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        """What runs it."""
        return TOOLS[self.tool]

    @property
    def file_name(self) -> str:
        """A name for its file, without suffix; those that differ in `config` only have the same."""
        parts = [self.tool, *(f"{name}_{value}" for name, value in self.arguments.items())]
        return re.sub(r"\W+", "_", "-".join(parts + [f"images_{self.images}"] * bool(self.images)))


def _ort(name: str, code: str = "", **arguments: Any) -> Setting:
    return Setting("ort", name, code, {"per_channel": False, "pre_process": False} | arguments)


def _inductor(name: str, code: str = "", config: Mapping[str, object] | None = None, **arguments: Any) -> Setting:
    """With Inductor's freezing, without which it keeps INT8 layers in float."""
    return Setting("pt2e", name, code, arguments, config=config or {})


def _nncf(name: str, code: str = "", images: int = 0, **arguments: Any) -> Setting:
    return Setting("nncf", name, code, arguments, images)


_BOTH = {"activation_type": UNSIGNED, "per_channel": True}
SETTINGS = (
    _ort("ort default"),
    _ort("ort U8", "activation_type=QuantType.QUInt8", activation_type=UNSIGNED),
    _ort("ort per channel", "per_channel=True", per_channel=True),
    _ort("ort reduce range", "reduce_range=True", reduce_range=True),
    _ort("ort pre-process", "quant_pre_process(path, prepared)", pre_process=True),
    _ort("ort percentile", "calibrate_method=CalibrationMethod.Percentile", method="percentile"),
    _ort("ort entropy", "calibrate_method=CalibrationMethod.Entropy", method="entropy"),
    _ort("ort most images", 'extra_options={"TensorQuantOverrides": ranges}', method="most_images"),
    _ort("ort U8, per channel", "activation_type=QuantType.QUInt8, per_channel=True", **_BOTH),
    _ort("ort U8, per channel, reduce range", "the same, reduce_range=True", **_BOTH, reduce_range=True),
    _ort("ort U8, per channel, most images", "the same, TensorQuantOverrides", **_BOTH, method="most_images"),
    _inductor("pt2e default", config={"freezing": False}),
    _inductor("pt2e freezing", "torch._inductor.config.freezing = True"),
    _inductor("pt2e freezing, C++ wrapper", "torch._inductor.config.cpp_wrapper = True", {"cpp_wrapper": True}),
    _inductor("pt2e freezing, max autotune", "torch._inductor.config.max_autotune = True", {"max_autotune": True}),
    _inductor("pt2e freezing, no asserts", "torch._inductor.config.size_asserts = False", {"size_asserts": False}),
    _inductor("pt2e freezing, min-max", "observer_or_fake_quant_ctr=MinMaxObserver", observer="minmax"),
    _inductor("pt2e freezing, most images", "observer_or_fake_quant_ctr=an observer", observer="most_images"),
    _inductor("pt2e freezing, reduce range", "get_default_x86_...(reduce_range=True)", reduce_range=True),
    _inductor("pt2e freezing, reduce range, C++ wrapper", "both lines", {"cpp_wrapper": True}, reduce_range=True),
    _inductor("pt2e freezing, per tensor", "qscheme=torch.per_tensor_symmetric", per_channel=False),
    _nncf("nncf default"),
    _nncf("nncf mixed", "preset=QuantizationPreset.MIXED", preset="mixed"),
    _nncf("nncf accurate bias", "fast_bias_correction=False", bias_correction="accurate"),
    _nncf("nncf no bias correction", "disable_bias_correction=True", bias_correction="none"),
    _nncf("nncf no SmoothQuant", "smooth_quant_alphas.matmul = -1", smooth_quant=False),
    _nncf("nncf 32 images", "subset_size=32", 32),
    _nncf("nncf 128 images", "subset_size=128", 128),
    _nncf("nncf min-max", "activations_range_estimator_params=MINMAX", ranges="minmax"),
    _nncf("nncf most images", "aggregator_type=AggregatorType.MEAN_NO_OUTLIERS", ranges=MOST_IMAGES),
    _nncf("nncf 7-bit weights", "overflow_fix=OverflowFix.ENABLE", overflow_fix="enable"),
    _nncf("nncf 8-bit weights", "overflow_fix=OverflowFix.DISABLE", overflow_fix="disable"),
    Setting(
        "nncf", "nncf throughput hint", 'PERFORMANCE_HINT: "THROUGHPUT"', config={"PERFORMANCE_HINT": "THROUGHPUT"}
    ),
)
