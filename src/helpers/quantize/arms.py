"""INT8 quantization of the study's models: what all ways share, and the eager-mode functions while PyTorch has them.

Every arm by its weights file; and the functions of eager mode, as long as PyTorch has it.
"""

import io
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from helpers.files import StudyError
from helpers.train.models import IMAGE_SIZE, build_model
from helpers.train.models import calibrate as calibrate
from helpers.train.taps import trim_dead_taps
from helpers.train.weights import load_state, load_weights, save_weights


class _Missing:
    """Stands for a name of `eager` where PyTorch has no torch.ao: it can be imported, and its use ends in a sentence."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StudyError(NO_LEGACY)

    __call__ = __getitem__ = __iter__ = _refuse


try:
    from helpers.quantize.eager import (  # noqa: F401 (for readers)
        ENGINES,
        OBSERVERS,
        QCONFIGS,
        WEIGHT_OBSERVERS,
        WIDTHS,
        activation_quantizers,
        activation_report,
        convert,
        count_fake_quantize,
        freeze_near_the_end,
        freeze_observers,
        fuse,
        fuse_for_qat,
        layer_sqnr,
        prepare,
        prepare_qat,
        ptq_report,
        qconfig_named,
        qconfig_of_width,
        quantize_only,
        set_engine,
        simulate,
        with_weights_of,
    )

    _MISSING, _REMEDY = "INT8 kernels for this CPU (fbgemm, x86)", "take an x86-64 CPU with AVX2"
except ImportError as error:
    if "torch.ao" not in str(error):
        raise
    ENGINES = ()
    OBSERVERS = QCONFIGS = WEIGHT_OBSERVERS = WIDTHS = _Missing()
    fuse = fuse_for_qat = prepare = prepare_qat = convert = simulate = with_weights_of = set_engine = _Missing()
    activation_quantizers = activation_report = layer_sqnr = ptq_report = quantize_only = _Missing()
    count_fake_quantize = freeze_near_the_end = freeze_observers = qconfig_named = qconfig_of_width = _Missing()
    _MISSING, _REMEDY = "torch.ao.quantization", "install an older torch"

# Whose INT8 kernels eager mode and TorchScript can use here: ENGINES. Without any, there are no legacy rows.
LEGACY = bool(ENGINES)
NO_LEGACY = (
    f"torch {torch.__version__} has no {_MISSING}: the legacy rows (eager-mode INT8, and what is exported from it) are left "
    f"out; for them {_REMEDY}."
)

# Every rule for quantization parameters by its name: where the range of an activation comes from, and how many of them a
# layer's weights share. The first is PyTorch's default for x86 CPUs.
QCONFIG_NAMES = (
    *("histogram_per_channel", "minmax_per_channel", "percentile_per_channel", "image_percentile_per_channel"),
    *("histogram_per_tensor", "minmax_per_tensor", "percentile_per_tensor", "image_percentile_per_tensor"),
)


def load_arm(path: Path, engine: str = "fbgemm", arch: str | None = None) -> nn.Module:
    """Load the model that a weights file of any arm stands for, ready to run: float, or INT8 with kernels of `engine`.

    INT8 arms are stored as they are before `convert` (weights and observers), because their file must hold no pickle;
    `convert` gives the same INT8 model every time. What is trimmed (see `taps.trim_dead_taps`) says whether it was
    before or after the quantization. What was calibrated only needs the float file of its `base` beside it. Raises StudyError for a file that cannot be used, see `load_weights`.
    """
    state, metadata = load_weights(path, arch)
    model = build_model(metadata["arch"])
    if base := metadata.get("base"):
        float_file = path.with_name(path.name.removesuffix(f"{metadata['arm']}{path.suffix}") + base + path.suffix)
        load_state(model, load_weights(float_file, metadata["arch"])[0], float_file)
    if metadata.get("trimmed") == "before":
        model = trim_dead_taps(model, IMAGE_SIZE)
    if metadata.get("trimmed") == "after":
        return trim_dead_taps(_load(model, state, metadata, path, engine), IMAGE_SIZE)
    return _load(model, state, metadata, path, engine)


def _load(model: nn.Module, state: dict[str, Tensor], metadata: dict[str, str], path: Path, engine: str) -> nn.Module:
    form = metadata.get("form", "")
    if form == "float":
        load_state(model, state, path)
        return model.eval()
    if form.endswith("_pt2e"):
        from helpers.quantize import pt2e  # with torchao it takes seconds to import, and most runs do without

        graph = pt2e.rebuild(model.eval(), form)
        load_state(graph, state, path)
        return pt2e.convert_pt2e(graph)
    if not LEGACY:
        raise StudyError(f"{path} cannot be loaded: {NO_LEGACY}")
    if form == "prepared":
        prepared = prepare(fuse(model), qconfig_named(metadata["qconfig"]))
    elif form == "prepared_qat":
        prepared = prepare_qat(fuse_for_qat(model))
    elif form == "prepared_observer_only":
        prepared = prepare_qat(fuse(model), qconfig_named(metadata["qconfig"]))
    else:
        raise StudyError(f"{path} has the form {form!r}; delete it and make it again.")
    if metadata.get("base"):
        state = prepared.state_dict() | state  # what calibration added to the float model
    load_state(prepared, state, path)
    return convert(prepared, engine)


def save_calibrated(path: Path, prepared: nn.Module, fused: nn.Module, metadata: dict[str, str]) -> None:
    """Write what calibration added to a model: the observers of `prepared`, made of `fused`, whose weights stay in their own file.

    metadata: see `weights.save_weights`; also `arm`, `qconfig`, and `base`, the float arm that `fused` came from, saved beside.
    """
    before = fused.state_dict()
    added = {
        name: value
        for name, value in prepared.state_dict().items()
        if name not in before or not torch.equal(value, before[name])
    }
    save_weights(path, added, metadata)


def is_eager_int8(model: nn.Module) -> bool:
    """Whether a model has INT8 layers of eager mode."""
    return any(hasattr(module, "set_weight_bias") for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights, biases and buffers of a float or INT8 model take, without file overhead."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if hasattr(module, "_packed_params") and hasattr(
            module, "weight"
        ):  # an INT8 layer of eager mode keeps its weights packed
            weight = module.weight()
            tensors += [weight, *([] if module.bias() is None else [module.bias()])]
            if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
                tensors.append(weight.q_per_channel_scales().float())
    return sum(t.numel() * t.element_size() for t in tensors)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Fraction of images on which two arrays of predicted classes agree, in [0, 1]."""
    return float((first == second).mean())


def state_bytes(model: nn.Module) -> int:
    """Bytes of `torch.save(model.state_dict())`, the file that an eager PyTorch model is usually shipped as."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes
