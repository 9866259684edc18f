import shutil
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from helpers.files import StudyError
from helpers.quantize.arms import QCONFIGS, calibrate, convert, fuse, load_arm, prepare, weight_bytes
from helpers.quantize.nncf import prepare_qat_nncf, quantize_openvino
from helpers.quantize.pt2e import convert_pt2e, prepare_pt2e, prepared_state
from helpers.serve.export import (
    LEGACY_OPSET,
    OPSET,
    SUFFIXES,
    artifact_bytes,
    convert_to_openvino,
    export_aotinductor,
    export_onnx,
    export_torchscript,
    stored_weight_bytes,
)
from helpers.serve.inspection import layers_run_as
from helpers.serve.profiling import onednn_reordered
from helpers.serve.runtimes import RUNTIMES, first_call, load_predictor, openvino_benchmark_app
from helpers.train.models import build_model, count_parameters, module_predictor
from helpers.train.weights import save_weights

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
    graph = prepare_pt2e(model)
    calibrate(graph, IMAGES)
    modules = {"fp32": model, "ptq": convert(prepared, "fbgemm"), "ptq_pt2e": convert_pt2e(graph)}
    save_weights(folder / "fp32.safetensors", model.state_dict(), {"arch": "resnet18", "form": "float"})
    made = {"arch": "resnet18", "form": "prepared", "qconfig": "histogram_per_channel"}
    save_weights(folder / "ptq.safetensors", prepared.state_dict(), made)
    made = {"arch": "resnet18", "form": "prepared_pt2e"}
    save_weights(folder / "ptq_pt2e.safetensors", prepared_state(graph), made)
    for arm in ("fp32", "ptq"):
        export_torchscript(modules[arm], folder / f"{arm}.pt")
    for arm in modules:
        export_onnx(modules[arm], folder / f"{arm}.onnx")
        convert_to_openvino(folder / f"{arm}.onnx", folder / f"{arm}.xml")
    if COMPILER:
        export_aotinductor(modules["ptq_pt2e"], folder / "ptq_pt2e.pt2")
    return folder, modules


COMPILER = shutil.which("g++")
NEWER = ("inductor", "aotinductor")
# What is compiled from the float model is compared with it in notebook 12 of the smoke study.
PAIRS = [("fp32", runtime) for runtime in RUNTIMES if runtime not in NEWER]
PAIRS += [("ptq", runtime) for runtime in ("eager", "torchscript", "onnxruntime", "openvino")]
PAIRS += [("ptq_pt2e", runtime) for runtime in (*NEWER, "onnxruntime", "openvino")]


@pytest.mark.parametrize(("arm", "runtime"), [pair for pair in PAIRS if COMPILER or pair[1] not in NEWER])
def test_every_runtime_gives_its_source_s_logits_for_any_batch(files, arm, runtime):
    folder, modules = files
    try:
        predictor = load_predictor(folder / f"{arm}{SUFFIXES[runtime]}", runtime, threads=1)
    except StudyError as error:
        assert runtime == "openvino_bf16" and "bfloat16" in str(error)  # a CPU without it
        return
    for n in (1, 3) if runtime in NEWER else (1, 3, 8):
        images = IMAGES[:n].numpy()
        expected, got = module_predictor(modules[arm])(images), predictor(images)
        assert got.shape == (n, 10) and got.dtype == np.float32
        if arm == "fp32" and runtime != "openvino_bf16":
            assert np.allclose(expected, got, rtol=1e-3, atol=1e-4)
        else:  # kernels round differently, and random weights amplify one step of the INT8 grid
            assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_files_really_run_in_int8(files, runtime):
    for arm, precision in (("fp32", "float32"), ("ptq", "int8")):
        layers = layers_run_as(files[0] / f"{arm}{SUFFIXES[runtime]}", runtime)
        assert len(layers) == 21 and {layer["precision"] for layer in layers} == {precision}


def test_only_eager_mode_int8_needs_the_deprecated_exporter(files):
    for arm in files[1]:
        opset = onnx.load(files[0] / f"{arm}.onnx").opset_import[0].version
        assert opset == (LEGACY_OPSET if arm == "ptq" else OPSET)


def test_a_graph_of_pt2e_comes_back_from_its_file_as_it_was(files):
    folder, modules = files
    again = module_predictor(load_arm(folder / "ptq_pt2e.safetensors"))(IMAGES.numpy())
    assert np.array_equal(again, module_predictor(modules["ptq_pt2e"])(IMAGES.numpy()))


def test_eager_mode_int8_is_refused_by_inductor_with_a_sentence(files):
    with pytest.raises(StudyError, match="PT2E"):
        load_predictor(files[0] / "ptq.safetensors", "inductor")


def test_without_a_compiler_inductor_says_what_to_install(files, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    with pytest.raises(StudyError, match="install g"):
        export_aotinductor(files[1]["fp32"], tmp_path / "fp32.pt2")


@pytest.mark.skipif(not COMPILER, reason="needs a compiler")
def test_a_package_copies_no_weights_in_its_calls_whatever_the_threads_of_its_exporter(tmp_path, capfd):
    """A layer of ResNet18 that oneDNN (3.12, AVX-512) packs in one way for 1 or 3 threads and in another for 2 or 4."""
    net = nn.Sequential(nn.Conv2d(3, 256, 1), nn.ReLU(), nn.Conv2d(256, 512, 1, stride=2)).eval()
    before = torch.get_num_threads()
    export_aotinductor(net, tmp_path / "net.pt2", threads=(1, 2), size=2)
    assert torch.get_num_threads() == before
    image = np.zeros((1, 3, 2, 2), np.float32)
    try:
        for threads in (1, 2):
            predictor = load_predictor(tmp_path / "net.pt2", "aotinductor", threads)
            predictor(image)
            capfd.readouterr()
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                predictor(image)
            said = capfd.readouterr().out
            assert ",exec,cpu,convolution," in said and onednn_reordered(said) == set(), threads
    finally:
        torch.set_num_threads(before)


def _no_compiler():
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_openvino_files_keep_float32_and_shrink_fourfold_when_quantized(files):
    folder, _ = files
    assert artifact_bytes(folder / "fp32.xml") > 44e6
    quantize_openvino(folder / "fp32.xml", IMAGES, folder / "ptq_nncf.xml")
    assert artifact_bytes(folder / "ptq_nncf.xml") < artifact_bytes(folder / "fp32.xml") / 3.5
    assert {layer["precision"] for layer in layers_run_as(folder / "ptq_nncf.xml", "openvino")} == {"int8"}


def test_an_ir_whose_writing_fails_leaves_what_was_there(files, tmp_path, monkeypatch):
    path = tmp_path / "model.xml"
    convert_to_openvino(files[0] / "ptq.onnx", path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["model.bin", "model.xml"]

    def fail(_model, aside, **_):
        aside.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("power")

    monkeypatch.setattr("openvino.save_model", fail)
    with pytest.raises(StudyError, match="OpenVINO does not convert it .RuntimeError: power"):
        convert_to_openvino(files[0] / "fp32.onnx", path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_weights_are_counted_in_the_file_itself(files):
    folder, modules = files
    parameters = count_parameters(modules["fp32"])
    for suffix in (".onnx", ".xml"):
        # Batch norm is folded away; its place takes a bias for each channel.
        assert 0.99 < stored_weight_bytes(folder / f"fp32{suffix}") / (4 * parameters) < 1.01
        assert 0.99 < stored_weight_bytes(folder / f"ptq{suffix}") / parameters < 1.02
    assert 0.99 < weight_bytes(modules["ptq_pt2e"]) / parameters < 1.02  # no float weights beside the INT8 ones
    with pytest.raises(StudyError, match="neither"):
        stored_weight_bytes(folder / "fp32.pt")


def test_a_first_call_does_not_pay_for_what_the_process_pays_once(monkeypatch):
    loads = iter([0.2, 0.001, 0.1, 0.001])

    def load(path, runtime, engine):
        time.sleep(next(loads))
        return lambda images: images

    monkeypatch.setattr("helpers.serve.runtimes.load_predictor", load)
    assert first_call("model.onnx", "onnxruntime", IMAGES.numpy()) < 50
    assert list(loads) == []


@pytest.mark.skipif(not COMPILER or torch.cuda.is_available(), reason="needs a compiler and no GPU")
def test_nncf_s_qat_is_refused_before_the_training_where_its_extension_cannot_run(files, monkeypatch):
    monkeypatch.setattr("nncf.quantize", lambda model, *_, **__: model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(StudyError, match="does not run on this machine's cuda"):
        prepare_qat_nncf(files[1]["fp32"], IMAGES)


@pytest.mark.parametrize(("said", "ms"), [("[ INFO ]    Median:        2.10 ms", 2.1), ("    Median: 350.00 us", 0.35)])
def test_openvino_s_own_benchmark_is_read_in_its_unit(monkeypatch, tmp_path, said, ms):
    answers = iter([said, ""])
    monkeypatch.setattr(
        "helpers.serve.runtimes.subprocess.run",
        lambda *_, **__: SimpleNamespace(stdout=next(answers), stderr="no model"),
    )
    assert openvino_benchmark_app(tmp_path / "model.xml", threads=1, batch=1) == pytest.approx(ms)
    with pytest.raises(StudyError, match="gave no median"):
        openvino_benchmark_app(tmp_path / "model.xml", threads=1, batch=1)


def test_damaged_files_and_unknown_runtimes_end_in_a_sentence(files, tmp_path):
    with pytest.raises(StudyError, match="runtime is 'tvm'"):
        load_predictor(files[0] / "fp32.pt", "tvm")
    for runtime, suffix in SUFFIXES.items():
        with pytest.raises(StudyError, match="does not exist"):
            load_predictor(tmp_path / f"none{suffix}", runtime)
        (tmp_path / f"damaged{suffix}").write_bytes(b"not a model")
        with pytest.raises(StudyError, match="damaged"):
            load_predictor(tmp_path / f"damaged{suffix}", runtime)
