"""Eager-mode INT8 quantization of the study's models, in PyTorch's own terms.

The only importer of `torch.ao.quantization`: when PyTorch drops it, this file changes and no other.
Called by notebooks and `runtimes`; calls `models`.
"""

import copy
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from helpers.files import StudyError
from helpers.models import build_model, load_state, load_weights

# Announced years ahead and still in torch 2.14; the study measures this path because the reference study took it.
warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel", category=UserWarning)
# The default observers use a narrower range on purpose (reduce_range, against saturation without VNNI).
warnings.filterwarnings("ignore", message="Please use quant_min and quant_max to specify the range")
from torch.ao import quantization as tq  # noqa: E402
from torch.ao.nn import quantized as nnq  # noqa: E402

ENGINES = tuple(engine for engine in ("fbgemm", "x86") if engine in torch.backends.quantized.supported_engines)

# Where the parameters of activations and weights come from. The first is PyTorch's default for x86 CPUs.
QCONFIGS: dict[str, tq.QConfig] = {
    "histogram_per_channel": tq.get_default_qconfig("fbgemm"),
    "minmax_per_channel": tq.QConfig(
        activation=tq.MinMaxObserver.with_args(reduce_range=True), weight=tq.default_per_channel_weight_observer
    ),
    "histogram_per_tensor": tq.QConfig(
        activation=tq.HistogramObserver.with_args(reduce_range=True), weight=tq.default_weight_observer
    ),
}


class FakeQuantize(tq.FusedMovingAvgObsFakeQuantize):
    """PyTorch's FakeQuantize, also where autocast computes in bfloat16: its kernel takes float32 only."""

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the INT8 grid and back; float32, the shape of `x`."""
        return super().forward(x.float())


# PyTorch's own QAT qconfig for x86 CPUs: moving average min-max, activations with a narrower range (reduce_range).
QAT_QCONFIG = tq.QConfig(
    activation=FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=True
    ),
    weight=tq.get_default_qat_qconfig("fbgemm").weight,
)


def set_engine(engine: str) -> None:
    """Choose the library whose INT8 kernels `convert` and `torch.jit.load` pack weights for, from now on.

    Raises StudyError for an engine that is not in ENGINES.
    """
    if engine not in ENGINES:
        raise StudyError(f"engine is {engine!r}; this machine allows {', '.join(ENGINES) or 'none'}.")
    torch.backends.quantized.engine = engine


def qconfig_named(name: str) -> tq.QConfig:
    """Look a qconfig up. Raises StudyError for a name that is not in QCONFIGS."""
    if name not in QCONFIGS:
        raise StudyError(f"qconfig is {name!r}; allowed are {', '.join(QCONFIGS)}.")
    return QCONFIGS[name]


def fuse(model: nn.Module) -> nn.Module:
    """Fold batch norm into the convolutions and join their ReLU, in a copy; the logits stay those of `model` in eval mode."""
    fused = copy.deepcopy(model).eval()
    fused.fuse_model(is_qat=False)
    return fused


def fuse_for_qat(model: nn.Module) -> nn.Module:
    """Join conv, batch norm and ReLU in a copy, so that QAT sees the folded weights while batch norm still learns."""
    fused = copy.deepcopy(model).train()
    fused.fuse_model(is_qat=True)
    return fused


def prepare(fused: nn.Module, qconfig: tq.QConfig) -> nn.Module:
    """Put observers into a copy of a fused model, where quantization parameters will be needed."""
    prepared = copy.deepcopy(fused).eval()
    prepared.qconfig = qconfig
    return tq.prepare(prepared, inplace=True)


def prepare_qat(fused: nn.Module, qconfig: tq.QConfig | None = None) -> nn.Module:
    """Put what `qconfig` holds into a copy of a fused model that will be trained.

    qconfig: FakeQuantize for weights and activations by default (Jacob et al., arXiv:1712.05877). With a PTQ qconfig
    only observers are attached and nothing is fake-quantised: what the reference study did.
    """
    prepared = copy.deepcopy(fused).train()
    prepared.qconfig = qconfig or QAT_QCONFIG
    return tq.prepare_qat(prepared, inplace=True)


def count_fake_quantize(model: nn.Module) -> int:
    """How many FakeQuantize modules the model holds."""
    return sum(isinstance(module, tq.FakeQuantizeBase) for module in model.modules())


def calibrate(prepared: nn.Module, images: Tensor, batch_size: int = 128) -> None:
    """Show images, float32 [N, 3, H, W], normalised, to the observers."""
    prepared.eval()
    with torch.inference_mode():
        for batch in images.split(batch_size):
            prepared(batch)


def freeze_observers(prepared: nn.Module) -> None:
    """Keep the quantization parameters as they are from now on."""
    prepared.apply(tq.disable_observer)


def freeze_batch_norm(prepared: nn.Module) -> None:
    """Keep the batch-norm statistics as they are from now on."""
    prepared.apply(nn.intrinsic.qat.freeze_bn_stats)


def convert(prepared: nn.Module, engine: str) -> nn.Module:
    """Replace the layers of a copy by INT8 ones, their weights packed for `engine` (one of ENGINES)."""
    set_engine(engine)
    return tq.convert(copy.deepcopy(prepared).eval(), inplace=True)


def load_arm(path: Path, engine: str = "fbgemm", arch: str | None = None) -> nn.Module:
    """Load the model that a weights file of any arm stands for, ready to run: float, or INT8 with kernels of `engine`.

    INT8 arms are stored as they are before `convert` (weights and observers), because their file must hold no pickle;
    `convert` gives the same INT8 model every time. Raises StudyError for a file that cannot be used, see `load_weights`.
    """
    state, metadata = load_weights(path, arch)
    model = build_model(metadata["arch"])
    form = metadata.get("form")
    if form == "float":
        load_state(model, state, path)
        return model.eval()
    if form == "prepared":
        prepared = prepare(fuse(model), qconfig_named(metadata["qconfig"]))
    elif form == "prepared_qat":
        prepared = prepare_qat(fuse_for_qat(model))
    elif form == "prepared_observer_only":
        prepared = prepare_qat(fuse(model), qconfig_named(metadata["qconfig"]))
    else:
        raise StudyError(f"{path} has the form {form!r}; delete it and make it again.")
    load_state(prepared, state, path)
    return convert(prepared, engine)


def layer_sqnr(reference: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """Signal-to-quantization-noise ratio in dB of each convolution's and the classifier's output, in order of execution.

    reference: the fused float model; quantized: what `convert` made of it; images: float32 [N, 3, H, W], normalised.
    SQNR = 10 log10(sum x^2 / sum (x - q)^2), x the float output and q the dequantised INT8 output; noise that earlier
    layers made is included. 6 dB are about one bit.
    """
    names = [n for n, m in quantized.named_modules() if isinstance(m, nnq.Conv2d | nnq.Linear)]
    expected, got = (_outputs(model, names, images) for model in (reference, quantized))
    return {
        name: float(10 * torch.log10(expected[name].square().sum() / (expected[name] - got[name]).square().sum()))
        for name in expected
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights, biases and buffers of a float or INT8 model take, without file overhead."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, nnq.Conv2d | nnq.Linear):
            weight = module.weight()
            tensors += [weight, *([] if module.bias() is None else [module.bias()])]
            if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
                tensors.append(weight.q_per_channel_scales().float())
    return sum(t.numel() * t.element_size() for t in tensors)


def _outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            outputs[name] = output.dequantize().double()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Fraction of images on which two arrays of predicted classes agree, in [0, 1]."""
    return float((first == second).mean())


def state_bytes(model: nn.Module) -> int:
    """Bytes of `torch.save(model.state_dict())`, the file that an eager PyTorch model is usually shipped as."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes
