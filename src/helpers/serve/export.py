"""Model files for every runtime: TorchScript, ONNX, OpenVINO's IR, packages compiled ahead of time; and how large they are."""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import onnx
import openvino
import torch
from torch import nn

from helpers.files import StudyError, check_whole, first_line, refused, seal, whole_file
from helpers.ir import save_openvino
from helpers.quantize.arms import is_eager_int8
from helpers.train.models import ANY_BATCH

# TorchScript and the TorchScript-based ONNX exporter are deprecated; both are measured because the reference study used
# them, and the newer exporter refuses eager-mode quantized models (torch 2.14).
for _message in ("`?torch.jit", "You are using the legacy TorchScript-based ONNX export", ".*legacy.*ONNX.*"):
    for _category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", message=_message, category=_category)


# What each runtime loads. Inductor compiles in the process that runs the model, so it starts from the weights.
SUFFIXES = {
    "eager": ".safetensors",
    "torchscript": ".pt",
    "inductor": ".safetensors",
    "aotinductor": ".pt2",
    "onnxruntime": ".onnx",
    "openvino": ".xml",
    "openvino_bf16": ".xml",
}
OPSET = 18  # the least that the dynamo-based exporter writes
LEGACY_OPSET = 17
# Freezing turns weights into constants, so that they are packed for the kernels once; thread counts may change after compiling.
INDUCTOR = {"freezing": True, "cpp.dynamic_threads": True}


def export_torchscript(model: nn.Module, path: Path) -> None:
    """Script, freeze (weights become constants, so batch norm can be folded) and save a model in eval mode."""
    frozen = torch.jit.freeze(torch.jit.script(model.eval()))
    with whole_file(path) as aside:
        aside.write_bytes(frozen.save_to_buffer())  # its own writer ends the process when the disk is full (torch 2.14)


@refused("PyTorch's ONNX exporter does not write it")
def export_onnx(model: nn.Module, path: Path, size: int = 32, batch: int = 0) -> None:
    """Write a model as ONNX, and check the file.

    model: float, a graph of `pt2e`, or INT8 of eager mode, for input float32 [N, 3, size, size]; batch: the only N that it
    takes, 0 for any, as the file does then. The dynamo-based exporter
    writes it, but eager mode's INT8 layers, which that one refuses (torch 2.14): the deprecated, TorchScript-based one makes
    QDQ pairs of them. Raises StudyError when the exporter fails, or the file does not pass ONNX's own checker.
    """
    model.eval()  # whose answer is None for a graph of PT2E
    images = (torch.zeros(batch or 2, 3, size, size),)
    named = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    with whole_file(path) as aside, torch.no_grad(), redirect_stdout(io.StringIO()):
        if is_eager_int8(model):
            free = {name: {0: "batch"} for name in ("images", "logits")}
            torch.onnx.export(
                model, images, aside, dynamo=False, opset_version=LEGACY_OPSET, dynamic_axes=free, **named
            )
        else:
            free = {"dynamic_shapes": None if batch else ANY_BATCH, "opset_version": OPSET}
            program = torch.onnx.export(model, images, dynamo=True, **free, **named)
            for node in program.model.graph:  # which it numbers; weights keep PyTorch's names
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of this machine
                if node.op_type in ("Conv", "Gemm") and node.inputs[1].name.endswith(".weight"):
                    node.name = node.inputs[1].name.removesuffix(".weight")
            program.save(aside, external_data=False)
        try:
            onnx.checker.check_model(str(aside), full_check=True)
        except onnx.checker.ValidationError as error:
            raise StudyError(f"{path.name} does not pass the ONNX checker ({first_line(error)}).") from error
        seal(aside)


def export_aotinductor(model: nn.Module, path: Path, threads: Sequence[int] = (1,), size: int = 32) -> None:
    """Compile a float model or a converted graph ahead of time, for one image a call, into packages that need no Python.

    Compiling for one shape lets Inductor pack the weights: with a free batch size (torch 2.14) they are reordered in every
    call, which makes ResNet18 five times slower. oneDNN packs for a number of threads, too: under another one it may copy
    weights into another layout in every call, so each of `threads` gets a package of its own, and `load_predictor` takes
    the one that fits. `path` is the package for the last of them, which serves any other count.
    Raises StudyError when there is no C++ compiler, or with what Inductor said.
    """
    for earlier in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        earlier.unlink()
    before = torch.get_num_threads()
    try:
        with refused("Inductor does not compile it"), torch.no_grad():
            program = torch.export.export(model, (torch.zeros(1, 3, size, size),))
            for count in threads:
                torch.set_num_threads(count)
                with whole_file(path if count == threads[-1] else package_for(path, count)) as aside:
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(aside), inductor_configs=INDUCTOR
                    )
    finally:
        torch.set_num_threads(before)


def package_for(path: Path, threads: int) -> Path:
    """Where the package compiled for a count of threads lies, beside `path`, which serves any other count."""
    return path.with_suffix(f".{threads}{path.suffix}")


@refused("OpenVINO does not convert it")
def convert_to_openvino(onnx_path: Path, path: Path) -> None:
    """Convert an ONNX file to an OpenVINO IR at `path` (.xml). Raises StudyError with what OpenVINO said when it fails."""
    check_whole(onnx_path)
    save_openvino(openvino.convert_model(onnx_path), path)


def artifact_bytes(path: Path) -> int:
    """Size of a model on disk: the file, and for an OpenVINO IR its .bin too."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def stored_weight_bytes(path: Path) -> int:
    """Bytes of the weights and constants in an exported file, after the exporter's folding: an .onnx or an OpenVINO .xml.

    Raises StudyError for a file of another kind.
    """
    if path.suffix == ".xml":
        return path.with_suffix(".bin").stat().st_size
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        constants = [
            a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")
        ]
        return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in (*graph.initializer, *constants))
    raise StudyError(f"{path} is neither .onnx nor .xml; the weights of other files are counted in their model.")
