import sys

import numpy as np
import pytest
import torch

from helpers.files import StudyError
from helpers.models import build_model, module_predictor, save_weights
from helpers.quantization import QCONFIGS, calibrate, convert, fuse, prepare
from helpers.runtimes import (
    RUNTIMES,
    SUFFIXES,
    artifact_bytes,
    convert_to_openvino,
    export_onnx,
    export_torchscript,
    layers_run_as,
    load_predictor,
    openvino_benchmark_app,
    quantize_openvino,
)

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float and an INT8 ResNet18 in every runtime's format, and their modules."""
    folder = tmp_path_factory.mktemp("exports")
    model = build_model("resnet18").train()
    for _ in range(3):
        model(IMAGES)
    prepared = prepare(fuse(model.eval()), QCONFIGS["histogram_per_channel"])
    calibrate(prepared, IMAGES)
    modules = {"fp32": model, "ptq": convert(prepared, "fbgemm")}
    save_weights(folder / "fp32.safetensors", model.state_dict(), {"arch": "resnet18", "form": "float"})
    made = {"arch": "resnet18", "form": "prepared", "qconfig": "histogram_per_channel"}
    save_weights(folder / "ptq.safetensors", prepared.state_dict(), made)
    for arm, module in modules.items():
        export_torchscript(module, folder / f"{arm}.pt")
        export_onnx(module, folder / f"{arm}.onnx")
        convert_to_openvino(folder / f"{arm}.onnx", folder / f"{arm}.xml")
    return folder, modules


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("arm", ["fp32", "ptq"])
def test_every_runtime_gives_its_source_s_logits_for_any_batch(files, arm, runtime):
    folder, modules = files
    predictor = load_predictor(folder / f"{arm}{SUFFIXES[runtime]}", runtime, threads=1)
    for n in (1, 3, 8):
        images = IMAGES[:n].numpy()
        expected, got = module_predictor(modules[arm])(images), predictor(images)
        assert got.shape == (n, 10) and got.dtype == np.float32
        if arm == "fp32":
            assert np.allclose(expected, got, rtol=1e-3, atol=1e-4)
        else:  # kernels round differently, and random weights amplify one step of the INT8 grid
            assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_files_really_run_in_int8(files, runtime):
    for arm, precision in (("fp32", "float32"), ("ptq", "int8")):
        layers = layers_run_as(files[0] / f"{arm}{SUFFIXES[runtime]}", runtime)
        assert len(layers) == 21 and {layer["precision"] for layer in layers} == {precision}


def test_openvino_files_keep_float32_and_shrink_fourfold_when_quantized(files):
    folder, _ = files
    assert artifact_bytes(folder / "fp32.xml") > 44e6
    quantize_openvino(folder / "fp32.xml", IMAGES, folder / "ptq_nncf.xml")
    assert artifact_bytes(folder / "ptq_nncf.xml") < artifact_bytes(folder / "fp32.xml") / 3.5
    assert {layer["precision"] for layer in layers_run_as(folder / "ptq_nncf.xml", "openvino")} == {"int8"}


def test_openvino_s_own_benchmark_gives_a_latency(files):
    assert 0 < openvino_benchmark_app(files[0] / "ptq.xml", threads=1, batch=1, seconds=1) < 1000


def test_damaged_files_and_unknown_runtimes_end_in_a_sentence(files, tmp_path):
    with pytest.raises(StudyError, match="runtime is 'tvm'"):
        load_predictor(files[0] / "fp32.pt", "tvm")
    for runtime, suffix in SUFFIXES.items():
        with pytest.raises(StudyError, match="does not exist"):
            load_predictor(tmp_path / f"none{suffix}", runtime)
        (tmp_path / f"damaged{suffix}").write_bytes(b"not a model")
        with pytest.raises(StudyError, match="damaged"):
            load_predictor(tmp_path / f"damaged{suffix}", runtime)


def test_no_telemetry_package_is_loaded():
    assert sys.modules["openvino_telemetry"] is None
