"""INT8 quantization of exported graphs by torchao (PT2E): what PyTorch offers in place of eager-mode quantization.

The only importer of torchao. Calls `files` and `models`.
Source: https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html
"""

import copy
import logging
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from helpers.files import StudyError
from helpers.quantize.ranges import MostImages
from helpers.train.models import ANY_BATCH

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers an enum the old way
# torch.export warns of its own guards, and Inductor of a tensor that torchao made from a tensor: nothing a reader can act on.
warnings.filterwarnings("ignore", message="Guards may run slower on Python")
warnings.filterwarnings("ignore", message="To copy construct from a tensor", module="torch._inductor")
# A graph has its mode built in; the flag that the ONNX exporter looks at says nothing about it.
warnings.filterwarnings("ignore", message="Exporting a model while it is in training mode")
import torchao.quantization.pt2e as _pt2e  # noqa: E402
from torchao.quantization.pt2e import observer as _observer  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e as _convert  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e as _prepare  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e as _prepare_qat  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as _x86  # noqa: E402

FORMS = ("prepared_pt2e", "prepared_qat_pt2e")


def export_graph(model: nn.Module, size: int = 32, batch: int = 0) -> nn.Module:
    """The model as a graph of ATen operators; `model` must be in the mode (train or eval) to be exported in.

    Input float32 [N, 3, size, size], output as the model's; batch: the only N that it takes, 0 for any. `train` and `eval`
    of the result switch its batch norm.
    """
    free = None if batch else ANY_BATCH
    graph = torch.export.export(model, (torch.zeros(batch or 2, 3, size, size),), dynamic_shapes=free).module()
    return _pt2e.allow_exported_model_train_eval(graph)


class ImagePercentileObserver(MostImages, _observer.MinMaxObserver):
    """The range that holds, at either end, the values of 95 % of the images."""


# Where the range of an activation comes from. The first is the quantizer's own choice.
OBSERVERS: dict[str, type[nn.Module]] = {
    "histogram": _observer.HistogramObserver,
    "minmax": _observer.MinMaxObserver,
    "most_images": ImagePercentileObserver,
}


def prepare_pt2e(
    model: nn.Module,
    size: int = 32,
    batch: int = 0,
    observer: str = "histogram",
    per_channel: bool = True,
    reduce_range: bool = False,
) -> nn.Module:
    """Export a float model and put observers where X86InductorQuantizer wants INT8; calibrate it, then `convert_pt2e`.

    Weights per channel, activations by histogram: the quantizer's own defaults, with the full range of 8 bits. size, batch:
    see `export_graph`. observer: one of OBSERVERS, of activations. per_channel: a scale for each output channel of the
    weights, else one a layer. reduce_range: activations of 7 bits.
    """
    model.eval()  # whose answer is None for a graph
    graph = export_graph(model, size, batch)
    _calls_apart(graph)
    graph = _prepare(graph, _quantizer(False, observer, per_channel, reduce_range))
    return _pt2e.allow_exported_model_train_eval(graph)


def prepare_qat_pt2e(model: nn.Module) -> nn.Module:
    """The same for QAT: FakeQuantize modules around live batch norm; train it, then `convert_pt2e`."""
    graph = _prepare_qat(export_graph(copy.deepcopy(model).train()), _quantizer(True))
    return _pt2e.allow_exported_model_train_eval(graph)


def convert_pt2e(prepared: nn.Module) -> nn.Module:
    """Fix the quantization parameters, in a copy: a graph with quantize and dequantize nodes that Inductor lowers to INT8."""
    prepared = copy.deepcopy(prepared)
    _pt2e.allow_exported_model_train_eval(prepared).eval()
    converted = _pt2e.allow_exported_model_train_eval(_convert(prepared))
    read = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    for name in converted.state_dict().keys() - read:  # float weights that the INT8 ones replaced
        owner, _, leaf = name.rpartition(".")
        delattr(converted.get_submodule(owner), leaf)
    converted.eval()
    return converted


def freeze_observers_pt2e(prepared: nn.Module) -> None:
    """Keep the quantization parameters as they are from now on."""
    prepared.apply(_pt2e.disable_observer)


def prepared_state(prepared: nn.Module) -> dict[str, Tensor]:
    """State of a prepared graph for `weights.save_weights`; activations that share an observer get a copy each."""
    return {name: tensor.clone() for name, tensor in prepared.state_dict().items()}


def rebuild(model: nn.Module, form: str) -> nn.Module:
    """A prepared graph without its state, of a float `model` and one of FORMS. Raises StudyError for another form."""
    if form not in FORMS:
        raise StudyError(f"form is {form!r}; allowed are {', '.join(FORMS)}.")
    return prepare_pt2e(model) if form == FORMS[0] else prepare_qat_pt2e(model)


def _quantizer(
    is_qat: bool, observer: str = "histogram", per_channel: bool = True, reduce_range: bool = False
) -> _x86.X86InductorQuantizer:
    config = _x86.get_default_x86_inductor_quantization_config(is_qat=is_qat, reduce_range=reduce_range)
    activations, weights = config.input_activation, config.weight
    if observer != "histogram":
        activations = replace(activations, observer_or_fake_quant_ctr=OBSERVERS[observer].with_args(eps=2**-12))
    if not per_channel:
        rule = _observer.MinMaxObserver.with_args(eps=2**-12)
        per_tensor = {"qscheme": torch.per_tensor_symmetric, "ch_axis": None, "observer_or_fake_quant_ctr": rule}
        weights = replace(weights, **per_tensor)
    config = replace(config, input_activation=activations, output_activation=activations, weight=weights)
    return _x86.X86InductorQuantizer().set_global(config)


def _calls_apart(graph: nn.Module) -> None:
    """Give each call of a module a name of its own: the quantizer refuses a ReLU that serves several activations."""
    seen = set()
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or not stack:
            continue
        key = list(stack)[-1]
        name, kind = stack[key]
        if (name, node.target) in seen:
            node.meta["nn_module_stack"] = stack | {key: (f"{name}.{node.name}", kind)}
        seen.add((name, node.target))
