import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from helpers.files import StudyError
from helpers.quantize.arms import count_fake_quantize, fuse, fuse_for_qat, prepare_qat
from helpers.train.models import ARCHS, as_quantizable, build_model, count_parameters, module_predictor
from helpers.train.taps import trim_dead_taps
from helpers.train.weights import load_weights, save_weights

MILLIONS = {"resnet18": 11.18, "resnet34": 21.29, "resnet50": 23.53, "resnet18_cifar": 11.17}


@pytest.mark.parametrize("arch", ARCHS)
def test_each_arch_has_its_published_size_and_the_seed_decides_its_weights(arch):
    model = build_model(arch, seed=1)
    assert round(count_parameters(model) / 1e6, 2) == MILLIONS[arch]
    assert torch.equal(model.conv1.weight, build_model(arch, seed=1).conv1.weight)
    assert not torch.equal(model.conv1.weight, build_model(arch, seed=2).conv1.weight)
    assert module_predictor(model)(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 10)


def test_weights_files_that_cannot_be_used_end_in_a_sentence(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(StudyError, match="does not exist"):
        load_weights(path)
    save_weights(path, {"x": torch.zeros(3)}, {"arch": "resnet18"})
    with pytest.raises(StudyError, match="holds a resnet18, not a resnet50"):
        load_weights(path, "resnet50")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StudyError, match="is damaged or was changed"):
        load_weights(path)
    save_weights(path, {"x": torch.zeros(3)}, {"made": "elsewhere"})
    with pytest.raises(StudyError, match="does not say which arch"):
        load_weights(path)


@pytest.mark.parametrize("arch", ["resnet34", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_torchvision_resnet_with_our_blocks_gives_its_logits(arch):
    model = torchvision.models.get_model(arch, num_classes=7).eval()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # as people do for small images
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(as_quantizable(model)(images), model(images), rtol=1e-4, atol=1e-4)
        assert torch.allclose(fuse(as_quantizable(model))(images), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_weights_and_logits_are_those_of_torchvision_s_resnet_of_that_seed(arch):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = torchvision.models.get_model(arch, num_classes=10).eval()
    ours, images = build_model(arch, seed=3).eval(), torch.randn(2, 3, 32, 32)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    with torch.inference_mode():
        assert torch.allclose(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_a_resnet_with_other_blocks_ends_in_a_sentence():
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    with pytest.raises(StudyError, match="Bottleneck and dilated"):
        as_quantizable(dilated)


def test_the_second_relu_is_the_only_difference_of_the_reference_study_s_resnet50():
    kept, dropped = (build_model("resnet50", second_relu=relu).eval() for relu in (True, False))
    assert all(
        torch.equal(a, b) for a, b in zip(kept.state_dict().values(), dropped.state_dict().values(), strict=True)
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(kept(images), dropped(images))
        for fused in (fuse(dropped), fuse_for_qat(dropped).eval()):
            assert torch.allclose(fused(images), dropped(images), rtol=1e-3, atol=1e-3)
    with pytest.raises(StudyError, match="only resnet50"):
        build_model("resnet18", second_relu=False)


def test_dead_taps_are_cut_without_changing_any_output():
    """Random strides, paddings, dilations and sizes: the smaller convolution answers like the whole one, to the last place."""
    generator, cut = np.random.default_rng(0), 0
    for _ in range(300):
        kernel, stride, padding, dilation = (
            int(generator.integers(*span)) for span in ((1, 6), (1, 4), (0, 5), (1, 4))
        )
        size = max(int(generator.integers(1, 10)), dilation * (kernel - 1) + 1 - 2 * padding)
        conv = nn.Conv2d(3, 2, kernel, stride, padding, dilation).double()
        trimmed = trim_dead_taps(nn.Sequential(conv), size)[0]
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert torch.allclose(conv(images), trimmed(images), atol=1e-12)
        cut += trimmed.weight.numel() < conv.weight.numel()
    assert cut > 20


def test_the_cifar_stem_keeps_the_size_of_the_images():
    shapes = {}
    model = build_model("resnet18_cifar")
    for name in ("layer1", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda *seen, name=name: shapes.update({name: seen[2].shape}))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == {"layer1": (2, 64, 32, 32), "layer4": (2, 512, 4, 4)}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_trimmed_resnet_is_far_smaller_and_answers_alike(arch):
    model = build_model(arch, seed=1).eval()
    trimmed = trim_dead_taps(model, 32)
    images = torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        expected, got = model(images), trimmed(images)
    assert (expected - got).abs().max() < 1e-4 * expected.abs().max()
    least = {"resnet18": 0.62, "resnet34": 0.52, "resnet50": 0.23, "resnet18_cifar": 0.0}[arch]
    cut = 1 - count_parameters(trimmed) / count_parameters(model)
    assert cut > least if least else cut == 0  # no map of the CIFAR stem is small enough
    assert count_parameters(trim_dead_taps(model, 224)) == count_parameters(model)
    with pytest.raises(StudyError, match="at least 1"):
        trim_dead_taps(model, 0)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_trimming_commutes_with_fusing_and_a_trimmed_model_goes_through_qat(arch):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build_model(arch, seed=1).train()
    model(images)
    model.eval()
    fused, trimmed = fuse(model), trim_dead_taps(model, 32)
    with torch.inference_mode():
        expected = fused(images)
        for other in (trim_dead_taps(fused, 32), fuse(trimmed), fuse_for_qat(trimmed).eval()):
            assert (other(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    qat = prepare_qat(fuse_for_qat(trimmed))
    whole = prepare_qat(fuse_for_qat(model))
    assert count_fake_quantize(qat) == count_fake_quantize(whole) > 0
    assert count_parameters(qat) == count_parameters(trimmed) < count_parameters(model)
    before = {name: weights.detach().clone() for name, weights in qat.named_parameters()}
    optimizer = torch.optim.SGD(qat.parameters(), 0.01)
    torch.nn.functional.cross_entropy(qat(images), torch.arange(8)).backward()
    optimizer.step()
    after = dict(qat.named_parameters())
    assert all(weights.isfinite().all() and not torch.equal(before[name], weights) for name, weights in after.items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_with_the_last_batch_norm_at_zero_every_block_starts_as_its_shortcut(arch):
    plain, zeroed = (build_model(arch, zero_init_residual=zero).eval() for zero in (False, True))
    changed = {name for name, value in zeroed.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    last = "bn3" if arch == "resnet50" else "bn2"
    assert changed == {f"{name}.{last}.weight" for name, module in plain.named_modules() if hasattr(module, last)}
    maps = torch.rand(2, zeroed.layer2[1].conv1.in_channels, 8, 8)
    with torch.inference_mode():
        assert torch.equal(zeroed.layer2[1](maps), maps) and not torch.equal(plain.layer2[1](maps), maps)
