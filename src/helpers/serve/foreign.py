"""Models that the study did not make: torchvision's by name, a `torch.export` archive (.pt2) or an ONNX file.

No file is unpickled, see `archives`.
"""

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
from torch import nn

from helpers.files import StudyError, first_line, path_given, refused
from helpers.quantize.ort import onnx_inputs
from helpers.serve.archives import EXPORT_IT, load_exported
from helpers.serve.runtimes import load_predictor

THREE_FORMS = "Give torchvision:NAME, a file that torch.export.save wrote (.pt2) or an ONNX file (.onnx); empty is the study's ResNet18."


@dataclass(frozen=True)
class Foreign:
    """A model that takes images float32 [N, 3, size, size] and answers logits [N, classes].

    name: safe in file names, and another one for each file. batch: the only N that it takes, 0 for any. module: in eval mode,
    None for an ONNX file; path: of the file, None for torchvision's and the study's own.
    """

    name: str
    size: int
    batch: int
    classes: int
    module: nn.Module | None = None
    path: Path | None = None


def open_model(given: str, size: int = 0, pretrained: bool = False, seed: int = 0) -> Foreign:
    """Open a model by torchvision's name for it, or from a file.

    given: torchvision:NAME, or a path to a .pt2 or .onnx. size: height and width of the images in pixels; 0: what the file
    fixes, else 224. pretrained: torchvision's weights, which it downloads once; else random ones, drawn from `seed`. Raises
    StudyError for an unknown name, a file of another kind or a damaged one, a model that takes anything but one batch of RGB
    images, or answers anything but one row of logits an image, and for a size that it does not take.
    """
    if given.startswith("torchvision:"):
        return _torchvision(given.removeprefix("torchvision:"), size or 224, pretrained, seed)
    path = path_given(given)
    if path.suffix not in (".pt2", ".onnx"):
        if path.suffix in (".pt", ".pth", ".ckpt", ".pkl", ".bin"):
            raise StudyError(
                f"model is {given!r}: such a file is unpickled to load it, which may run any code, so the study does not. {EXPORT_IT}"
            )
        near = difflib.get_close_matches(given, torchvision_names(), 1)
        hint = f" Did you mean torchvision:{near[0]}?" if near else ""
        raise StudyError(f"model is {given!r}, which is no model here. {THREE_FORMS}{hint}")
    if not path.is_file():
        raise StudyError(f"model is {given!r}, but there is no such file. {THREE_FORMS}")
    if pretrained:
        raise StudyError(f"pretrained is True for {path.name}; a file brings its own weights, so leave it False.")
    return _pt2(path, size) if path.suffix == ".pt2" else _onnx(path, size)


def of_module(name: str, module: nn.Module, size: int, batch: int = 0, path: Path | None = None) -> Foreign:
    """A float module as a Foreign, tried once on blank images. Raises StudyError, see `open_model`."""
    blank = np.zeros((batch or 1, 3, size, size), np.float32)
    with refused(f"{name} does not take images of {size}x{size} pixels; give another size"):
        with torch.inference_mode():
            answer = module(torch.from_numpy(blank))
    if not isinstance(answer, torch.Tensor):
        raise StudyError(f"{name} answers a {type(answer).__name__}; one tensor of logits [N, classes] is needed.")
    return Foreign(name, size, batch, _classes(name, answer.shape, len(blank)), module, path)


def torchvision_names() -> list[str]:
    """Torchvision's float image classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, size: int, pretrained: bool, seed: int) -> Foreign:
    if name not in torchvision_names():
        near = difflib.get_close_matches(name, torchvision_names(), 3, 0.4)
        raise StudyError(
            f"torchvision has no classifier {name!r}; near are {', '.join(near) or 'none'} "
            f"({len(torchvision_names())} in all, see torchvision.models.list_models)."
        )
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
    with torch.random.fork_rng(), refused(f"torchvision does not give {name} with its weights; give pretrained: False"):
        torch.manual_seed(seed)
        module = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **extra).eval()
    return of_module(f"torchvision_{name}{'_pretrained' if pretrained else ''}", module, size)


def _pt2(path: Path, size: int) -> Foreign:
    program = load_exported(path)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    if not all(isinstance(value, torch.Tensor) for value in inputs):
        raise StudyError(f"{path.name} takes something that is no tensor; one batch of images is needed.")
    size, batch = _taken(path.name, [[_fixed(n) for n in value.shape] for value in inputs], size)
    module = program.module(check_guards=False)
    module.train = lambda mode=True: module  # an exported graph has its mode built in, and refuses to be asked
    module.eval = lambda: module
    return of_module(_file_name(path), module, size, batch, path)


def _fixed(length: Any) -> int:
    """A dimension of an exported program; 0 where it is free."""
    return length if isinstance(length, int) else 0


def _onnx(path: Path, size: int) -> Foreign:
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf and onnx have their own
        raise StudyError(f"{path} is no ONNX model ({first_line(error)}).") from error
    shapes = []
    for value in onnx_inputs(model):
        kind = value.type.tensor_type
        if kind.elem_type != onnx.TensorProto.FLOAT:
            raise StudyError(f"{path.name} takes {value.name} in another type than float32; export it for float32.")
        shapes.append([of.dim_value for of in kind.shape.dim])
    size, batch = _taken(path.name, shapes, size)
    if len(model.graph.output) != 1:
        raise StudyError(f"{path.name} has {len(model.graph.output)} outputs; one of logits [N, classes] is needed.")
    blank = np.zeros((batch or 1, 3, size, size), np.float32)
    with refused(f"{path.name} does not take images of {size}x{size} pixels in ONNX Runtime; give another size"):
        answer = load_predictor(path, "onnxruntime")(blank)
    return Foreign(_file_name(path), size, batch, _classes(path.name, answer.shape, len(blank)), None, path)


def _taken(name: str, shapes: list[list[int]], size: int) -> tuple[int, int]:
    """The size and the batch of a file by the shapes of its inputs, 0 for what is free; size: what was asked for."""
    if len(shapes) != 1:
        raise StudyError(
            f"{name} takes {len(shapes)} inputs; this compares models of one, a batch of images [N, 3, H, W]."
        )
    (shape,) = shapes
    if len(shape) != 4 or shape[1] not in (0, 3) or shape[2] != shape[3]:
        raise StudyError(f"{name} takes {shape}; a batch of square RGB images [N, 3, H, H] is needed (0: any).")
    if size and shape[2] and size != shape[2]:
        raise StudyError(
            f"size is {size}, but {name} was exported for {shape[2]}x{shape[2]} pixels; give size: {shape[2]}."
        )
    if shape[0] > 1:
        raise StudyError(f"{name} was exported for {shape[0]} images a call; export it for one, or for any number.")
    return shape[2] or size or 224, shape[0]


def _classes(name: str, shape: tuple[int, ...], n: int) -> int:
    if len(shape) != 2 or shape[0] != n:
        raise StudyError(f"{name} answers {list(shape)} to {n} images; logits [N, classes] are needed.")
    return int(shape[1])


def _file_name(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', path.name)}_{digest[:8]}"
