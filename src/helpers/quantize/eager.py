"""Eager-mode INT8 quantization of the study's models, in PyTorch's own terms; deprecated, as the reference study used it.

The only importer of `torch.ao`: when PyTorch drops it, this file goes. `arms` passes its functions on
as long as they are there.
"""

import copy
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from helpers.files import StudyError
from helpers.quantize.ranges import MostImages
from helpers.train.models import BasicBlock, Bottleneck, ResidualAdd, ResNet, as_quantizable, calibrate, run_hooked


class NoEagerMode(StudyError, ImportError):
    """PyTorch has lost its eager-mode quantization: importing this module ends in a sentence."""


# Announced years ahead and still in torch 2.14; the study measures this path because the reference study took it.
warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel", category=UserWarning)
# The default observers use a narrower range on purpose (reduce_range, against saturation without VNNI).
warnings.filterwarnings("ignore", message="Please use quant_min and quant_max to specify the range")
try:
    from torch.ao import quantization as tq
    from torch.ao.nn import quantized as nnq
except ImportError as error:
    raise NoEagerMode(
        f"torch {torch.__version__} has no torch.ao.quantization; install an older torch for this."
    ) from error

ENGINES = tuple(engine for engine in ("fbgemm", "x86") if engine in torch.backends.quantized.supported_engines)


class PercentileObserver(tq.MinMaxObserver):
    """The range of a tensor without its tails: of each batch, the most extreme 0.1 % on either side are not looked at."""

    tail = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        """Record the range of `x`, any shape, and return it."""
        values = x.detach().float().flatten()
        beyond = int(self.tail * len(values))
        low, high = (values.kthvalue(k).values for k in (1 + beyond, len(values) - beyond))
        super().forward(torch.stack([low, high]))
        return x


class ImagePercentileObserver(MostImages, tq.MinMaxObserver):
    """The range that holds, at either end, the values of 95 % of the images."""


class AutocastHistogramObserver(tq.HistogramObserver):
    """PyTorch's HistogramObserver, also where autocast computes in bfloat16: on a GPU its histogram takes float32 only."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Record the values of `x_orig`, any shape, and return it."""
        super().forward(x_orig.float())
        return x_orig


# Where the range of an activation comes from, and how many of them a layer's weights share.
OBSERVERS = {
    "histogram": AutocastHistogramObserver,
    "minmax": tq.MinMaxObserver,
    "percentile": PercentileObserver,
    "image_percentile": ImagePercentileObserver,
}
WEIGHT_OBSERVERS = {
    "per_channel": tq.default_per_channel_weight_observer,
    "per_tensor": tq.default_weight_observer,
}
# Every combination by its name. The first is PyTorch's default for x86 CPUs.
QCONFIGS: dict[str, tq.QConfig] = {
    f"{observer}_{weights}": tq.QConfig(
        activation=OBSERVERS[observer].with_args(reduce_range=True), weight=WEIGHT_OBSERVERS[weights]
    )
    for weights in WEIGHT_OBSERVERS
    for observer in OBSERVERS
}


class AutocastFakeQuantize(tq.FusedMovingAvgObsFakeQuantize):
    """PyTorch's FakeQuantize, also where autocast computes in bfloat16: its kernel takes float32 only."""

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the INT8 grid and back; float32, the shape of `x`."""
        return super().forward(x.float())


# PyTorch's own QAT qconfig for x86 CPUs: moving average min-max, activations with a narrower range (reduce_range).
QAT_QCONFIG = tq.QConfig(
    activation=AutocastFakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=True
    ),
    weight=tq.get_default_qat_qconfig("fbgemm").weight,
)


class WidthHistogramObserver(tq.HistogramObserver):
    """PyTorch's HistogramObserver, searching the range with the least error for as many levels as it will really have.

    PyTorch's own counts the levels of the integer type, 256, also where `quant_min` and `quant_max` leave 16.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what PyTorch's HistogramObserver takes."""
        super().__init__(*args, **kwargs)
        self.dst_nbins = self.quant_max - self.quant_min + 1


# Bits of weights and of activations, from the widest to the narrowest.
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}


def qconfig_of_width(weight_bits: int, activation_bits: int, ptq: str = "") -> tq.QConfig:
    """The qconfig that rounds weights and activations to so many bits: for `prepare_qat`, or for `simulate`.

    ptq: one of QCONFIGS, whose observers `simulate` is to use; empty: QAT's own. 8 and 8 bits give that qconfig, or
    QAT_QCONFIG, as they are; below that weights are symmetric and activations affine per tensor as in them, but nothing
    converts it: narrower integers exist in simulation only. Raises StudyError for bits outside 2 to 8 and for an unknown
    qconfig.
    """
    served = qconfig_named(ptq) if ptq else QAT_QCONFIG
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not 2 <= bits <= 8:
            raise StudyError(f"{name} is {bits}; allowed are 2 to 8.")
    if (weight_bits, activation_bits) == (8, 8):
        return served
    # No reduce_range here: it keeps sums of 8-bit times 8-bit products from saturating in 16 bits, which narrower ones
    # never reach, and it would take a bit away from every activation.
    weights = {"quant_min": -(2 ** (weight_bits - 1)), "quant_max": 2 ** (weight_bits - 1) - 1}
    activations = {"quant_min": 0, "quant_max": 2**activation_bits - 1}
    if ptq.startswith("histogram"):
        return tq.QConfig(WidthHistogramObserver.with_args(**activations), served.weight.with_args(**weights))
    # What has a narrower range (reduce_range) gets the whole one back.
    whole = {"reduce_range": False} | activations
    return tq.QConfig(served.activation.with_args(**whole), served.weight.with_args(**weights))


def set_engine(engine: str) -> None:
    """Choose the library whose INT8 kernels `convert` and `torch.jit.load` pack weights for, from now on.

    Raises StudyError for an engine that is not in ENGINES, and where PyTorch has none of them.
    """
    if not ENGINES:
        raise StudyError("PyTorch has no INT8 kernels for this CPU (fbgemm, x86); take an x86-64 CPU with AVX2.")
    if engine not in ENGINES:
        raise StudyError(f"engine is {engine!r}; allowed are {', '.join(ENGINES)}.")
    torch.backends.quantized.engine = engine


def qconfig_named(name: str) -> tq.QConfig:
    """Look a qconfig up. Raises StudyError for a name that is not in QCONFIGS."""
    if name not in QCONFIGS:
        raise StudyError(f"qconfig is {name!r}; allowed are {', '.join(QCONFIGS)}.")
    return QCONFIGS[name]


# What is joined in each kind of module, in order of execution.
_JOINED = {
    ResNet: [["conv1", "bn1", "relu"]],
    BasicBlock: [["conv1", "bn1", "relu"], ["conv2", "bn2"]],
    Bottleneck: [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["conv3", "bn3"]],
}


def fuse(model: ResNet) -> nn.Module:
    """Fold batch norm into the convolutions and join their ReLU, in a copy; the logits stay those of `model` in eval mode.

    Raises StudyError for a model that is not built from the blocks of `models`.
    """
    return _fuse(copy.deepcopy(model).eval(), tq.fuse_modules)


def fuse_for_qat(model: ResNet) -> nn.Module:
    """Join conv, batch norm and ReLU in a copy, so that QAT sees the folded weights while batch norm still learns.

    Raises StudyError as `fuse` does.
    """
    return _fuse(copy.deepcopy(model).train(), tq.fuse_modules_qat)


def _fuse(model: ResNet, fuse_modules: Callable[..., nn.Module]) -> nn.Module:
    """Fuse `model` in place, with stubs where INT8 begins and ends and additions that can be observed."""
    if not isinstance(model, ResNet):
        raise StudyError(
            f"{type(model).__name__} is not fused here; for a ResNet of torchvision use as_quantizable first."
        )
    for module in list(model.modules()):
        for names in _JOINED.get(type(module), []):
            there = [name for name in names if not isinstance(getattr(module, name), nn.Identity)]
            fuse_modules(module, there, inplace=True)
        if getattr(module, "downsample", None) is not None:
            fuse_modules(module.downsample, ["0", "1"], inplace=True)
        for name, child in module.named_children():
            if isinstance(child, ResidualAdd):
                setattr(module, name, nnq.FloatFunctional())
    model.quant, model.dequant = tq.QuantStub(), tq.DeQuantStub()
    return model


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


def freeze_observers(prepared: nn.Module) -> None:
    """Keep the quantization parameters as they are from now on."""
    prepared.apply(tq.disable_observer)


def freeze_batch_norm(prepared: nn.Module) -> None:
    """Keep the batch-norm statistics as they are from now on."""
    prepared.apply(nn.intrinsic.qat.freeze_bn_stats)


def freeze_near_the_end(prepared: nn.Module, done: float) -> None:
    """The `before_step` of QAT: ranges rest for the last tenth of the training, batch-norm statistics for the last twentieth.

    Not earlier: weights that still move fast, held in frozen statistics, diverge. done: finished part of the training, [0, 1);
    of fewer than ten steps none is that late, and nothing rests.
    """
    if done >= 0.90:
        freeze_observers(prepared)
    if done >= 0.95:
        freeze_batch_norm(prepared)


def with_weights_of(prepared: nn.Module, qconfig: tq.QConfig) -> nn.Module:
    """A copy of a calibrated model of which `convert` will round the weights as `qconfig` says.

    What the observers of the activations saw stays: they look at the float model, so the weights' rule is nothing to them.
    """
    other = copy.deepcopy(prepared)
    for module in other.modules():
        if getattr(module, "qconfig", None) is not None:
            module.qconfig = tq.QConfig(activation=module.qconfig.activation, weight=qconfig.weight)
    return other


def convert(prepared: nn.Module, engine: str) -> nn.Module:
    """Replace the layers of a copy by INT8 ones, their weights packed for `engine` (one of ENGINES)."""
    set_engine(engine)
    return tq.convert(copy.deepcopy(prepared).eval(), inplace=True)


def simulate(fused: nn.Module, qconfig: tq.QConfig, images: Tensor) -> nn.Module:
    """PTQ in float arithmetic, in a copy: weights on the INT8 grid, and a calibrated FakeQuantize after every activation.

    Unlike an INT8 model it can be quantised in part, see `quantize_only`; all is quantised at first. images: the
    calibration images, float32 [N, 3, H, W], normalised.
    """
    activation = tq.FakeQuantize.with_args(observer=qconfig.activation)
    simulated = prepare(fused, tq.QConfig(activation=activation, weight=qconfig.weight))
    simulated.apply(tq.disable_fake_quant)
    calibrate(simulated, images)
    simulated.apply(tq.disable_observer)
    with torch.no_grad():
        for module in simulated.modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                module.weight.copy_(tq.FakeQuantize(qconfig.weight)(module.weight))
    simulated.apply(tq.enable_fake_quant)
    return simulated


def activation_quantizers(simulated: nn.Module) -> dict[str, tq.FakeQuantize]:
    """The FakeQuantize of every activation, by the name of the layer whose output it rounds, in order of the modules."""
    suffix = ".activation_post_process"
    return {n.removesuffix(suffix): m for n, m in simulated.named_modules() if isinstance(m, tq.FakeQuantize)}


def quantize_only(simulated: nn.Module, layers: Collection[str]) -> None:
    """Quantise the activations of these layers and no others; the weights stay on the INT8 grid."""
    for name, quantizer in activation_quantizers(simulated).items():
        quantizer.enable_fake_quant(name in layers)


def activation_report(simulated: nn.Module, images: Tensor) -> list[dict[str, float | str]]:
    """What the calibrated range of each activation leaves of an ordinary image; one row a layer, in order of execution.

    images: float32 [N, 3, H, W], normalised, other ones than those of the calibration. Rows have layer; range: width of
    the calibrated range; typical: the largest magnitude in the median image, at least half a step; spread: range / typical; levels: INT8 steps
    within `typical`; sqnr_db: of all images together, 10 log10(sum x^2 / sum (x - q)^2); sqnr_typical_db: the same for
    each image alone, of which the median. Each activation is rounded alone; only the weights are on the INT8 grid before.
    """
    quantizers = activation_quantizers(simulated)
    rows: dict[
        str, dict[str, float | str]
    ] = {}  # a fused layer calls its quantizer twice, the second time to no effect

    def look(layer: str):
        def hook(quantizer: tq.FakeQuantize, inputs: tuple[Tensor], _output: Tensor) -> None:
            x = inputs[0].flatten(1).double()
            step = float(quantizer.scale)
            low = -step * int(quantizer.zero_point)
            high = low + step * (quantizer.quant_max - quantizer.quant_min)
            rounded = (torch.round((x - low) / step) * step + low).clamp(low, high)
            typical = max(float(x.abs().amax(1).median()), step / 2)  # smaller values are rounded to zero anyway
            rows[layer] = {
                **{"layer": layer, "range": high - low, "typical": typical},
                **{"spread": (high - low) / typical, "levels": typical / step},
                "sqnr_db": _sqnr(x, rounded),
                "sqnr_typical_db": _sqnr(x, rounded, typical=True),
            }

        return hook

    enabled = [name for name, quantizer in quantizers.items() if quantizer.fake_quant_enabled[0]]
    quantize_only(simulated, [])
    try:
        hooks = (quantizer.register_forward_hook(look(layer)) for layer, quantizer in quantizers.items())
        run_hooked(simulated, images, hooks)
    finally:
        quantize_only(simulated, enabled)
    return list(rows.values())


def ptq_report(
    model: resnet.ResNet, calibration: Tensor, probe: Tensor, qconfig: str = "histogram_per_channel"
) -> tuple[float, list[dict[str, float | str]]]:
    """What PTQ would make of a torchvision ResNet, float, as it is: does it collapse, and in which layers?

    calibration, probe: disjoint images as the model was trained on, float32 [N, 3, H, W], normalised; qconfig: one of
    QCONFIGS. Returns the fraction of the probed images that keep the float model's class, and the rows of
    `activation_report`, fewest levels first. INT8 is simulated. Raises StudyError for blocks that are not torchvision's and
    for an unknown qconfig.
    """
    simulated = simulate(fuse(as_quantizable(model)), qconfig_named(qconfig), calibration)
    with torch.inference_mode():
        kept = simulated(probe).argmax(1) == copy.deepcopy(model).eval()(probe).argmax(1)
    return float(kept.float().mean()), sorted(activation_report(simulated, probe), key=lambda row: row["levels"])


def layer_sqnr(reference: nn.Module, quantized: nn.Module, images: Tensor, typical: bool = False) -> dict[str, float]:
    """Signal-to-quantization-noise ratio in dB of each convolution's and the classifier's output, in order of execution.

    reference: the fused float model; quantized: what `convert` made of it; images: float32 [N, 3, H, W], normalised.
    SQNR = 10 log10(sum x^2 / sum (x - q)^2), x the float output and q the dequantised INT8 output, over all images
    together, or with `typical` for each image alone, of which the median; noise that earlier layers made is included.
    6 dB are about one bit.
    """
    names = [n for n, m in quantized.named_modules() if isinstance(m, nnq.Conv2d | nnq.Linear)]
    expected, got = (_outputs(model, names, images) for model in (reference, quantized))
    return {name: _sqnr(expected[name], got[name], typical) for name in expected}


def _sqnr(x: Tensor, q: Tensor, typical: bool = False) -> float:
    signal, noise = (part.flatten(1).square().sum(1).clamp(min=1e-30) for part in (x, x - q))
    return float(10 * torch.log10((signal / noise).median() if typical else signal.sum() / noise.sum()))


def _outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            outputs[name] = output.dequantize().double()

        return hook

    run_hooked(model, images, (model.get_submodule(name).register_forward_hook(keep(name)) for name in names))
    return outputs
