"""Code to copy: it makes the file of one way to serve a model, and runs it, without this project."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from helpers.machine import isa_here, sums_saturate
from helpers.serve.foreign import Foreign

# By what the model is: `model`, a module in eval mode; of an ONNX file only the path is needed.
_OPEN = {
    "study": """\
import torch
import torchvision
from safetensors.torch import load_file

model = torchvision.models.resnet18(num_classes=10)
model.load_state_dict(load_file($path))
model.eval()
""",
    "torchvision": """\
import torch
import torchvision

torch.manual_seed($seed)
model = torchvision.models.get_model($name, weights=$weights$extra).eval()
""",
    ".pt2": """\
import torch

model = torch.export.load($path).module()  # your own file: PyTorch may unpickle what is in it
""",
    ".onnx": "",
}
_IMAGES = """\
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MEAN, STD = np.float32($mean), np.float32($std)


def prepare(file):
    picture = ImageOps.fit(Image.open(file).convert("RGB"), ($size, $size), Image.Resampling.BILINEAR)
    return ((np.asarray(picture, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None].copy()


files = sorted(file for file in Path($images).rglob("*.*") if file.is_file())  # a folder with your images
images = [prepare(file) for file in files[:: max(1, len(files) // $calibration_images)][:$calibration_images]]
"""
_TO_ONNX = """\
example = (torch.zeros(${example}, 3, $size, $size),)
free = $free
torch.onnx.export(model, example, "model.onnx", dynamo=True, dynamic_shapes=free, external_data=False)
"""
_TO_OPENVINO = """\
import openvino

float_model = openvino.convert_model("$onnx")
float_model.reshape([1, 3, $size, $size])
"""
_RUN_OPENVINO = """\
hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "$precision", "INFERENCE_NUM_THREADS": $threads}
run = openvino.Core().compile_model("model.xml", "CPU", hints)
logits = run(images[0])[0]
"""
_RUN_ONNXRUNTIME = """\
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = $threads
session = onnxruntime.InferenceSession("$file", options, providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: images[0]})[0]
"""
_RUN_TORCH = """\
torch.set_num_threads($threads)
with torch.inference_mode():
    logits = $run(torch.from_numpy(images[0])$layout).numpy()
"""
_COMPILE = """\
import torch._inductor.config

torch._inductor.config.freezing = True
run = torch.compile(model, dynamic=False)
"""

# (arm, runtime) -> whether it starts from an ONNX file, and what makes and runs it.
_MAKE: dict[tuple[str, str], tuple[bool, str]] = {
    ("fp32", "eager"): (False, _RUN_TORCH),
    ("fp32", "eager_channels_last"): (False, "model.to(memory_format=torch.channels_last)\n" + _RUN_TORCH),
    ("fp32", "inductor"): (False, _COMPILE + _RUN_TORCH),
    ("fp32", "onnxruntime"): (True, "import onnxruntime\n\n" + _RUN_ONNXRUNTIME),
    ("fp32", "openvino"): (
        True,
        _TO_OPENVINO + 'openvino.save_model(float_model, "model.xml", compress_to_fp16=False)\n' + _RUN_OPENVINO,
    ),
    ("fp32", "openvino_bf16"): (
        True,
        _TO_OPENVINO + 'openvino.save_model(float_model, "model.xml", compress_to_fp16=False)\n' + _RUN_OPENVINO,
    ),
    ("ptq_nncf", "openvino"): (
        True,
        "import nncf\n"
        + _TO_OPENVINO
        + """\
int8_model = nncf.quantize(float_model, nncf.Dataset(images), subset_size=len(images))
openvino.save_model(int8_model, "model.xml", compress_to_fp16=False)
"""
        + _RUN_OPENVINO,
    ),
    ("ptq_ort_u8", "onnxruntime"): (
        True,
        """\
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static


class Reader(CalibrationDataReader):
    left = iter(images)
    name = onnxruntime.InferenceSession("$onnx", providers=["CPUExecutionProvider"]).get_inputs()[0].name

    def get_next(self):
        image = next(self.left, None)
        return None if image is None else {self.name: image}


quant_pre_process("$onnx", "prepared.onnx")
types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
quantize_static("prepared.onnx", "model-int8.onnx", Reader(), QuantFormat.QDQ, per_channel=True, **types, $reduced)
"""
        + _RUN_ONNXRUNTIME,
    ),
    ("ptq_pt2e", "inductor"): (
        False,
        """\
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

graph = torch.export.export(model, (torch.zeros(1, 3, $size, $size),)).module()
calls = set()
for node in graph.graph.nodes:  # the quantizer refuses one ReLU that is called several times: each call gets a name
    if node.op == "call_function" and (stack := node.meta.get("nn_module_stack")):
        key, (name, kind) = list(stack.items())[-1]
        if (name, node.target) in calls:
            node.meta["nn_module_stack"] = stack | {key: (f"{name}.{node.name}", kind)}
        calls.add((name, node.target))
quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config($reduced))
prepared = prepare_pt2e(graph, quantizer)
with torch.no_grad():
    for image in images:
        prepared(torch.from_numpy(image))
model = convert_pt2e(prepared)
torch.export.save(torch.export.export(model, (torch.zeros(1, 3, $size, $size),)), "model-int8.pt2")
"""
        + _COMPILE
        + _RUN_TORCH,
    ),
}


def code_to_copy(
    way: tuple[str, str],
    model: Foreign,
    given: str,
    images: str,
    normal: tuple[Sequence[float], Sequence[float]],
    calibration_images: int,
    threads: int,
    seed: int,
) -> str:
    """A script for one of `candidates.WAYS`: it opens the model, makes the file beside itself, and answers one image.

    given: the model as the notebook was told; images: a folder, empty for one that the reader has yet to name; normal: mean
    and standard deviation per channel, of pixels scaled to [0, 1]; threads: of the runtime; seed: of random weights. `logits` is float32 [1, classes].
    """
    kind = "study" if not given else "torchvision" if given.startswith("torchvision:") else Path(given).suffix
    name = given.removeprefix("torchvision:")
    of_onnx, make = _MAKE[way]
    written = _OPEN[kind] + "\n" + _IMAGES + "\n"
    written += (_TO_ONNX if of_onnx and kind != ".onnx" else "") + make + "print(logits.argmax(), logits.shape)\n"
    mean, std = normal
    pretrained = model.name.endswith("_pretrained")
    return Template(written.lstrip()).substitute(
        path=repr(str(model.path)),
        name=repr(name),
        weights="'DEFAULT'" if pretrained else None,
        extra=", init_weights=True" if name in ("googlenet", "inception_v3") and not pretrained else "",
        images=repr(images or "my_images"),
        mean=[round(value, 6) for value in mean],
        std=[round(value, 6) for value in std],
        size=model.size,
        example=model.batch or 2,
        free=None if model.batch else '({0: torch.export.Dim("batch", min=1, max=65536)},)',
        onnx=str(model.path) if kind == ".onnx" else "model.onnx",
        file={"ptq_ort_u8": "model-int8.onnx"}.get(way[0], str(model.path) if kind == ".onnx" else "model.onnx"),
        precision="bf16" if way[1] == "openvino_bf16" else "f32",
        calibration_images=calibration_images,
        threads=threads,
        seed=seed,
        reduced=f"reduce_range={sums_saturate(isa_here())}",  # 7 bits where 8-bit products saturate
        run="run" if way[1] == "inductor" else "model",
        layout=".contiguous(memory_format=torch.channels_last)" if way[1] == "eager_channels_last" else "",
    )
