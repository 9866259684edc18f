import copy
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import run
from torch import nn

from helpers.files import StudyError
from helpers.quantize.arms import (
    ENGINES,
    QCONFIG_NAMES,
    QCONFIGS,
    WIDTHS,
    activation_quantizers,
    activation_report,
    agreement,
    calibrate,
    convert,
    count_fake_quantize,
    freeze_near_the_end,
    fuse,
    fuse_for_qat,
    layer_sqnr,
    load_arm,
    prepare,
    prepare_qat,
    ptq_report,
    qconfig_named,
    qconfig_of_width,
    quantize_only,
    set_engine,
    simulate,
    weight_bytes,
    with_weights_of,
)
from helpers.quantize.eager import WidthHistogramObserver
from helpers.train.models import build_model
from helpers.train.taps import trim_dead_taps
from helpers.train.weights import save_weights

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def model(request):
    """A model whose batch norm has seen data, so that its activations have ordinary ranges."""
    model = build_model(request.param).train()
    for _ in range(3):
        model(IMAGES)
    return model.eval()


def test_fused_model_gives_the_float_model_s_logits(model):
    assert torch.allclose(fuse(model)(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fuse(model).modules())


def test_int8_model_is_near_the_float_model_and_a_quarter_of_its_size(model):
    fused = fuse(model)
    prepared = prepare(fused, QCONFIGS["histogram_per_channel"])
    calibrate(prepared, IMAGES)
    quantized = convert(prepared, ENGINES[0])
    sqnr = layer_sqnr(fused, quantized, IMAGES)
    assert list(sqnr)[0] == "conv1" and list(sqnr)[-1] == "fc" and min(sqnr.values()) > 10
    assert 3.9 < weight_bytes(model) / weight_bytes(quantized) < 4.1


def test_int8_models_trimmed_after_conversion_answer_to_the_last_bit(model):
    prepared = prepare(fuse(model), QCONFIGS["histogram_per_channel"])
    calibrate(prepared, IMAGES)
    qat = prepare_qat(fuse_for_qat(model))
    qat(IMAGES)
    for int8 in (convert(prepared, ENGINES[0]), convert(qat, ENGINES[0])):
        assert torch.equal(int8(IMAGES), trim_dead_taps(int8, 32)(IMAGES))
    before = copy.deepcopy(prepared.state_dict())
    trim_dead_taps(prepared, 32)
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())


def test_the_simulation_answers_like_the_int8_model_and_in_part_like_the_float_model(model):
    fused, qconfig = fuse(model), QCONFIGS["histogram_per_channel"]
    prepared = prepare(fused, qconfig)
    calibrate(prepared, IMAGES)
    simulated = simulate(fused, qconfig, IMAGES)
    with torch.inference_mode():
        expected, got = convert(prepared, "fbgemm")(IMAGES), simulated(IMAGES)
        assert np.corrcoef(expected.flatten(), got.flatten())[0, 1] > 0.95
        quantize_only(simulated, [])
        weights_alone = np.corrcoef(fused(IMAGES).flatten(), simulated(IMAGES).flatten())[0, 1]
        assert weights_alone > np.corrcoef(fused(IMAGES).flatten(), got.flatten())[0, 1]


def test_the_report_finds_the_layer_whose_range_one_image_stretched(model):
    simulated = simulate(fuse(model), QCONFIGS["minmax_per_channel"], IMAGES)
    before = {row["layer"]: row for row in activation_report(simulated, IMAGES)}
    assert list(before)[0] == "quant" and list(before)[-1] == "fc"
    activation_quantizers(simulated)["layer3.0.conv1"].scale.mul_(8)
    after = {row["layer"]: row for row in activation_report(simulated, IMAGES)}
    assert [name for name in before if after[name]["spread"] > 2 * before[name]["spread"]] == ["layer3.0.conv1"]
    lost = before["layer3.0.conv1"]["sqnr_typical_db"] - after["layer3.0.conv1"]["sqnr_typical_db"]
    assert lost == pytest.approx(20 * np.log10(8), abs=4)  # eight times the step


def test_the_check_of_your_own_resnet_sees_the_collapse_that_one_image_makes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine = torchvision.models.resnet18(num_classes=10).train()
    for _ in range(3):
        mine(IMAGES)
    extreme = torch.cat([IMAGES, 1000 * IMAGES[:1]])
    probe = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # untrained logits lie close
    before = copy.deepcopy(mine.state_dict())
    (kept, rows), (kept_then, rows_then) = (ptq_report(mine, shown, probe) for shown in (IMAGES, extreme))
    assert kept > 0.8 and rows[0]["levels"] == min(row["levels"] for row in rows) > 16
    assert kept_then < 0.5 and max(row["levels"] for row in rows_then if row["layer"] != "fc") < 16
    assert mine.training and all(torch.equal(before[name], value) for name, value in mine.state_dict().items())


def test_percentile_ranges_leave_out_the_tails():
    x = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([1000.0] * 5)])
    ranges = {}
    for name in ("minmax_per_channel", "percentile_per_channel"):
        observer = QCONFIGS[name].activation()
        observer(x)
        ranges[name] = float(observer.max_val)
    assert ranges["minmax_per_channel"] == 1000 and 0.98 < ranges["percentile_per_channel"] < 1


def test_only_the_qat_qconfig_brings_fake_quantize(model):
    assert count_fake_quantize(prepare_qat(fuse_for_qat(model))) > 40
    assert count_fake_quantize(prepare_qat(fuse(model), QCONFIGS["histogram_per_channel"])) == 0


def test_qat_trains_under_bfloat16_autocast(model):
    qat = prepare_qat(fuse_for_qat(model))
    with torch.autocast("cpu", torch.bfloat16):
        logits = qat(IMAGES)
    logits.square().mean().backward()
    assert logits.dtype == torch.float32 and all(p.grad.isfinite().all() for p in qat.parameters())


@pytest.mark.parametrize("form", ["prepared", "prepared_qat", "prepared_observer_only"])
def test_a_saved_arm_comes_back_as_the_same_int8_model(model, form, tmp_path):
    qconfig = QCONFIGS["minmax_per_channel"]
    made = {
        "prepared": lambda: prepare(fuse(model), qconfig),
        "prepared_qat": lambda: prepare_qat(fuse_for_qat(model)),
        "prepared_observer_only": lambda: prepare_qat(fuse(model), qconfig),
    }[form]()
    made.train() if form != "prepared" else made.eval()
    made(IMAGES)
    arch = "resnet50" if hasattr(model.layer1[0], "conv3") else "resnet18"
    save_weights(
        tmp_path / "arm.safetensors", made.state_dict(), {"arch": arch, "form": form, "qconfig": "minmax_per_channel"}
    )
    assert torch.equal(load_arm(tmp_path / "arm.safetensors", "fbgemm")(IMAGES), convert(made, "fbgemm")(IMAGES))


def test_unknown_words_end_in_a_sentence():
    with pytest.raises(StudyError, match="engine is 'mkl'"):
        set_engine("mkl")
    with pytest.raises(StudyError, match="qconfig is 'int2'"):
        qconfig_named("int2")
    with pytest.raises(StudyError, match="as_quantizable"):
        fuse(torchvision.models.resnet18())
    assert tuple(QCONFIGS) == QCONFIG_NAMES  # what parameters allow is what there is


def test_agreement_by_hand():
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 0])) == 0.5


@pytest.mark.parametrize("observer", ["histogram", "percentile"])
def test_weights_can_get_another_rule_after_calibration(observer):
    fused, wanted = fuse(build_model("resnet18").eval()), QCONFIGS[f"{observer}_per_tensor"]
    prepared, direct = prepare(fused, QCONFIGS[f"{observer}_per_channel"]), prepare(fused, wanted)
    calibrate(prepared, IMAGES)
    calibrate(direct, IMAGES)
    changed = convert(with_weights_of(prepared, wanted), "fbgemm")(IMAGES)
    assert torch.equal(changed, convert(direct, "fbgemm")(IMAGES))
    assert not torch.equal(changed, convert(prepared, "fbgemm")(IMAGES))


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("width", ["w4a8", "w4a4"])
def test_so_many_bits_leave_so_many_levels(width, qat):
    weight_bits, activation_bits = WIDTHS[width]
    model = build_model("resnet18").eval()
    qconfig = qconfig_of_width(*WIDTHS[width], "" if qat else "histogram_per_channel")
    simulated = prepare_qat(fuse_for_qat(model), qconfig) if qat else simulate(fuse(model), qconfig, IMAGES)
    simulated.train(qat)(IMAGES)
    weights = simulated.fc.weight_fake_quant(simulated.fc.weight) if qat else simulated.fc.weight
    levels = max(len(row.unique()) for row in weights)
    assert 2 ** (weight_bits - 1) < levels <= 2**weight_bits  # a channel of 512 weights uses most of its levels
    seen = {}
    quantizer = activation_quantizers(simulated)["conv1"]
    quantizer.register_forward_hook(lambda _module, _inputs, output: seen.update(conv1=output))
    simulated(IMAGES)
    assert 2 ** (activation_bits - 1) < len(seen["conv1"].unique()) <= 2**activation_bits


def test_qat_at_8_bits_simulates_the_int8_model_that_it_becomes(model):
    qat = prepare_qat(fuse_for_qat(model), qconfig_of_width(*WIDTHS["w8a8"]))
    for _ in range(10):  # until the ranges have settled
        qat(IMAGES)
    freeze_near_the_end(qat, 0.95)
    with torch.inference_mode():
        simulated, int8 = qat.eval()(IMAGES), convert(qat, "fbgemm")(IMAGES)
    assert np.corrcoef(simulated.flatten(), int8.flatten())[0, 1] > 0.95


@pytest.mark.parametrize("name", QCONFIGS)
def test_ptq_at_8_bits_simulates_the_scales_that_are_served(name):
    fused = fuse(build_model("resnet18").eval())
    prepared = prepare(fused, QCONFIGS[name])
    calibrate(prepared, IMAGES)
    served, simulated = convert(prepared, "fbgemm"), simulate(fused, qconfig_of_width(*WIDTHS["w8a8"], name), IMAGES)
    for layer, quantizer in activation_quantizers(simulated).items():
        assert float(served.get_submodule(layer).scale) == float(quantizer.scale)


def test_ranges_rest_near_the_end_of_qat_and_not_before():
    qat = prepare_qat(fuse_for_qat(build_model("resnet18")))
    qat(IMAGES)
    ranges = [qat.conv1.activation_post_process.scale.clone()]
    for done in (0.89, 0.90):
        freeze_near_the_end(qat, done)
        qat(3 * IMAGES)
        ranges.append(qat.conv1.activation_post_process.scale.clone())
    assert ranges[0] != ranges[1] == ranges[2]


def test_a_range_for_16_levels_rounds_with_less_error_than_one_for_256():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    errors = {}
    for observer in (WidthHistogramObserver, WidthHistogramObserver.__base__):
        looking = observer(quant_min=0, quant_max=15)
        looking(x)
        scale, zero_point = looking.calculate_qparams()
        rounded = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, 15)
        errors[observer] = float((x - rounded).square().mean())
    assert errors[WidthHistogramObserver] < 0.8 * errors[WidthHistogramObserver.__base__]


@pytest.mark.parametrize("bits", [(1, 8), (8, 9)])
def test_a_width_that_is_none_ends_in_a_sentence(bits):
    with pytest.raises(StudyError, match="bits is .; allowed are 2 to 8"):
        qconfig_of_width(*bits)


def test_without_int8_kernels_for_this_cpu_their_use_ends_in_a_sentence():
    """As on ARM, where PyTorch has neither engine."""
    script = "import torch; torch._C._supported_qengines = lambda: [2]; from helpers.quantize.arms import NO_LEGACY, set_engine"
    done = run(sys.executable, "-c", f"{script}; print(NO_LEGACY); set_engine('fbgemm')")
    for said in (done.stdout, done.stderr.splitlines()[-1]):
        assert "no INT8 kernels for this CPU (fbgemm, x86)" in said
    assert "StudyError" in done.stderr.splitlines()[-1]


# What this package imports of them is denied; torch, torchvision and torchao (0.18) still import them themselves.
WITHOUT_TORCH_AO = """
import builtins

imported = builtins.__import__


def without(name, globals=None, locals=None, fromlist=(), level=0):
    wanted = [name, *(f"{name}.{part}" for part in fromlist or ())]
    if (globals or {}).get("__name__", "").startswith("helpers"):
        for module in wanted:
            if module.startswith(("torch.ao", "torch.nn.quantized", "torchvision.models.quantization")):
                raise ImportError(f"No module named {module!r}")
    return imported(name, globals, locals, fromlist, level)


import torchvision

del torchvision.models.quantization
builtins.__import__ = without
"""
WHAT_STAYS = """
import torch

from helpers.quantize import arms, nncf, pt2e
from helpers.serve import export, inspection
from helpers.train.models import ARCHS, build_model, calibrate

images = torch.randn(8, 3, 32, 32)
models = {arch: build_model(arch).eval() for arch in ARCHS}
graph = pt2e.prepare_pt2e(models["resnet18"])
calibrate(graph, images)
assert pt2e.convert_pt2e(graph)(images).isfinite().all()
assert not arms.LEGACY
try:
    arms.fusee
except AttributeError:
    print("a typo is a typo")
from helpers.quantize.arms import fuse, QCONFIGS
try:
    QCONFIGS["histogram_per_channel"]
except Exception as error:
    print(error)
fuse(models["resnet18"])
"""


def test_without_torch_ao_float_models_build_pt2e_quantizes_and_eager_mode_ends_in_a_sentence():
    done = run(sys.executable, "-c", WITHOUT_TORCH_AO + WHAT_STAYS)
    last = done.stderr.splitlines()[-1]
    assert "StudyError: torch" in last and "has no torch.ao.quantization: the legacy rows" in last, done.stderr
    assert done.stdout.splitlines()[-2] == "a typo is a typo" and done.stdout.splitlines()[-1] in last


def test_one_extreme_image_widens_every_range_but_that_of_the_images():
    images = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[7] *= 100
    widths = {}
    for name, qconfig in QCONFIGS.items():
        observer = qconfig.activation()
        for batch in images.split(32):
            observer(batch)
        scale, _ = observer.calculate_qparams()
        widths[name.removesuffix("_per_channel").removesuffix("_per_tensor")] = 127 * float(scale)
    assert widths.pop("image_percentile") == pytest.approx(1, abs=0.1)
    assert min(widths.values()) > 10, widths


@pytest.mark.parametrize("trimmed", ["before", "after"])
@pytest.mark.parametrize("form", ["float", "prepared", "prepared_qat", "prepared_observer_only"])
def test_a_saved_trimmed_arm_comes_back_to_the_last_bit(form, trimmed, tmp_path):
    model = build_model("resnet18").train()
    model(IMAGES)
    model = trim_dead_taps(model.eval(), 32) if trimmed == "before" else model.eval()
    qconfig = QCONFIGS["minmax_per_channel"]
    made = {
        "float": lambda: model,
        "prepared": lambda: prepare(fuse(model), qconfig),
        "prepared_qat": lambda: prepare_qat(fuse_for_qat(model)),
        "prepared_observer_only": lambda: prepare_qat(fuse(model), qconfig),
    }[form]()
    made.train(form.startswith("prepared_"))(IMAGES)
    path = tmp_path / "arm.safetensors"
    of = {"arch": "resnet18", "form": form, "qconfig": "minmax_per_channel", "trimmed": trimmed}
    save_weights(path, made.state_dict(), of)
    kept = made if form == "float" else convert(made, "fbgemm")
    kept = trim_dead_taps(kept, 32) if trimmed == "after" else kept
    assert torch.equal(load_arm(path, "fbgemm")(IMAGES), kept(IMAGES))
