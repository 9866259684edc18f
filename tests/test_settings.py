import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from helpers.files import StudyError
from helpers.quantize import nncf, pt2e
from helpers.quantize.ort import UNSIGNED, quantize_onnxruntime
from helpers.quantize.ranges import range_of_most
from helpers.quantize.settings import SETTINGS
from helpers.serve import candidates
from helpers.serve.candidates import float_onnx, make_setting
from helpers.serve.foreign import of_module
from helpers.train.models import build_model, calibrate

SIZE = 8
IMAGES = torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
BY_NAME = {setting.name: setting for setting in SETTINGS}


class Net(nn.Module):
    """Two convolutions, ReLUs and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu1, self.relu2, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(self.relu2(self.conv2(self.relu1(self.conv1(images)))).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return of_module("net", Net().eval(), SIZE)


@pytest.fixture(scope="module")
def float_file(model, tmp_path_factory):
    return float_onnx(model, tmp_path_factory.mktemp("float"))


def quantized(float_file, path, images=IMAGES, **arguments):
    """The scale and the zero-point of the input, and the number of scales of the first weight."""
    quantize_onnxruntime(float_file, images, path, **arguments)
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    of_input = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == graph.input[0].name)
    scale, zero = (stored[name] for name in of_input.input[1:3])
    most = max(stored[n.input[1]].size for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored)
    return float(scale), zero, most


def test_names_and_lines_tell_the_settings_apart():
    assert len(BY_NAME) == len(SETTINGS)
    for tool in ("ort", "pt2e", "nncf"):
        first, *others = [setting for setting in SETTINGS if setting.tool == tool]
        assert not first.code and all(setting.code for setting in others)
        assert all((s.arguments, s.images, s.config) != (first.arguments, first.images, first.config) for s in others)


def test_u8_and_s8_files_differ_in_zero_points_and_per_channel_in_the_number_of_scales(float_file, tmp_path):
    signed, unsigned, channels = (
        quantized(float_file, tmp_path / f"{number}.onnx", per_channel=number == 2, activation_type=kind)
        for number, kind in enumerate((UNSIGNED.QInt8, UNSIGNED, UNSIGNED))
    )
    assert signed[1].dtype == np.int8 and unsigned[1].dtype == np.uint8
    assert int(unsigned[1]) - int(signed[1]) == 128 and signed[0] == pytest.approx(unsigned[0])
    assert unsigned[2] == 1 and channels[2] == 8


def test_ranges_of_most_images_leave_out_the_extreme_one_in_every_tool_that_has_them(float_file, model, tmp_path):
    images = IMAGES.clone()
    images[7] *= 100
    usual = quantized(float_file, tmp_path / "usual.onnx", images)[0]
    most = quantized(float_file, tmp_path / "most.onnx", images, method="most_images")[0]
    _, high = range_of_most(images.flatten(1).amin(1), images.flatten(1).amax(1))
    assert most == pytest.approx(float(high) / 255, rel=1e-3) and usual > 50 * most
    widths = {}
    for observer in ("minmax", "most_images"):
        prepared = pt2e.prepare_pt2e(model.module, SIZE, observer=observer)
        calibrate(prepared, images, 16)
        node = next(n for n in pt2e.convert_pt2e(prepared).graph.nodes if "quantize_per_tensor" in str(n.target))
        widths[observer] = node.args[1]
    assert widths["minmax"] > 50 * widths["most_images"]


@pytest.mark.parametrize("name", ["nncf mixed", "nncf accurate bias", "nncf no bias correction", "nncf 7-bit weights"])
def test_a_setting_of_nncf_reaches_it(name, model, tmp_path, monkeypatch):
    asked = {}

    def quantize(float_model, _, **options):
        asked.update(options)
        return float_model

    monkeypatch.setattr(nncf.nncf, "quantize", quantize)
    assert not make_setting(BY_NAME[name], model, tmp_path, IMAGES).reason
    advanced = asked["advanced_parameters"]
    found = {
        "nncf mixed": asked["preset"] == nncf.nncf.QuantizationPreset.MIXED,
        "nncf accurate bias": not asked["fast_bias_correction"],
        "nncf no bias correction": advanced.disable_bias_correction,
        "nncf 7-bit weights": advanced.overflow_fix == nncf.nncf.OverflowFix.ENABLE,
    }
    assert [other for other, holds in found.items() if holds] == [name]


def test_a_setting_that_is_refused_is_a_row_with_its_reason(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StudyError("NNCF does not quantize it (ValueError: no).")

    monkeypatch.setattr(candidates, "quantize_openvino", refuse)
    candidate = make_setting(BY_NAME["nncf mixed"], model, tmp_path, IMAGES)
    assert candidate.reason == "NNCF does not quantize it (ValueError: no)." and candidate.file_bytes == 0


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_pt2e_fuses_every_relu_of_the_study_s_models_so_that_each_convolution_gives_int8(arch):
    graph = pt2e.prepare_pt2e(build_model(arch))
    calibrate(graph, torch.rand(2, 3, 32, 32), 2)
    graph = pt2e.convert_pt2e(graph)
    relus = [node for node in graph.graph.nodes if node.name.startswith("relu")]
    users = {str(user.target) for relu in relus for user in relu.users}
    assert users == {"quantized_decomposed.quantize_per_tensor.default"}
