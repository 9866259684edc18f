"""The models: torchvision's ResNets with a ReLU module for each activation, and what every use of a module needs.

Imports neither torch.ao nor torchvision's quantizable models.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import resnet

from helpers.files import StudyError

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet18_cifar")
ANY_BATCH = ({0: torch.export.Dim("batch", min=1, max=65536)},)  # dynamic shapes of a model exported for any batch size
IMAGE_SIZE = 32  # height and width in pixels, of all images of the study

Predictor = Callable[[np.ndarray], np.ndarray]


class ResidualAdd(nn.Module):
    """The end of a block as a module, in the place of which eager-mode quantization puts its own (FloatFunctional)."""

    def __init__(self) -> None:
        """A module for its ReLU, by which PT2E's quantizer knows what to fuse with the convolution before it."""
        super().__init__()
        self.relu = nn.ReLU()

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """relu(x + y), all of one shape; FloatFunctional has a method of that name."""
        return self.relu(x + y)


class BasicBlock(resnet.BasicBlock):
    """Torchvision's block, which uses one ReLU twice, with a ReLU for each activation: quantization tells them apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what torchvision's BasicBlock takes."""
        super().__init__(*args, **kwargs)
        self.add_relu = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps [N, C, H, W] to feature maps."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.add_relu.add_relu(out, identity)


class Bottleneck(resnet.Bottleneck):
    """Torchvision's block, which uses one ReLU three times, with a ReLU for each activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what torchvision's Bottleneck takes."""
        super().__init__(*args, **kwargs)
        self.relu1, self.relu2, self.skip_add_relu = nn.ReLU(), nn.ReLU(), ResidualAdd()
        del self.relu

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps [N, C, H, W] to feature maps."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.skip_add_relu.add_relu(out, identity)


class ResNet(resnet.ResNet):
    """Torchvision's ResNet, with a place before and after it where eager-mode quantization puts its stubs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what torchvision's ResNet takes."""
        super().__init__(*args, **kwargs)
        self.quant, self.dequant = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 [N, 3, H, W] to logits [N, num_classes]."""
        return self.dequant(self._forward_impl(self.quant(x)))


def build_model(
    arch: str, seed: int = 0, num_classes: int = 10, second_relu: bool = True, zero_init_residual: bool = False
) -> ResNet:
    """Build a ResNet (He et al., arXiv:1512.03385) with random float weights drawn from `seed`.

    `_cifar` is the stem of that paper's own CIFAR models: a 3x3 convolution that keeps the size, and no pooling, so that
    32x32 images are 4x4 in the last stage. Input float32 [N, 3, H, W], output logits [N, num_classes]. second_relu: False
    leaves out the ReLU after the second batch norm of each bottleneck, as the reference study did; the same seed gives the
    same weights. zero_init_residual: the last batch norm of each block starts with factors of zero, so that every block
    starts as its shortcut (Goyal et al., arXiv:1706.02677); all other weights are the same. Raises StudyError for an arch that is not in ARCHS, and when it has no bottlenecks to leave a ReLU out of.
    """
    layers = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
    if arch not in ARCHS:
        raise StudyError(f"arch is {arch!r}; allowed are {', '.join(ARCHS)}.")
    if not second_relu and arch != "resnet50":
        raise StudyError(f"second_relu is False for {arch}; only resnet50 has a second ReLU to leave out.")
    block = Bottleneck if arch == "resnet50" else BasicBlock
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(block, layers[arch.removesuffix("_cifar")], num_classes, zero_init_residual)
        if arch.endswith("_cifar"):
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, Bottleneck) and not second_relu:
            module.relu2 = nn.Identity()
    return model


def as_quantizable(model: resnet.ResNet) -> ResNet:
    """Any of torchvision's ResNets (or ResNeXts, wide ones included) with this module's blocks, in eval mode; a copy.

    Quantization, eager or PT2E, refuses torchvision's own blocks, where one ReLU module serves several activations. Stem
    and classifier may have been replaced. Raises StudyError when the blocks are not torchvision's, or dilated.
    """
    blocks = {resnet.BasicBlock: BasicBlock, resnet.Bottleneck: Bottleneck}
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    kinds = {type(block) for stage in stages for block in stage}
    dilated = any(isinstance(m, nn.Conv2d) and m.dilation != (1, 1) for m in model.modules())
    if len(kinds) != 1 or not kinds <= set(blocks) or dilated:
        raise StudyError(
            f"The blocks are {', '.join(sorted(kind.__name__ for kind in kinds))}{' and dilated' if dilated else ''}; "
            "this works for torchvision's BasicBlock or Bottleneck without dilation."
        )
    twin = ResNet(
        blocks[kinds.pop()],
        [len(stage) for stage in stages],
        groups=model.groups,
        width_per_group=model.base_width,
    )
    for name in ("conv1", "maxpool", "fc"):
        setattr(twin, name, copy.deepcopy(getattr(model, name)))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each tensor once."""
    return sum(p.numel() for p in model.parameters())


def run_hooked(model: nn.Module, images: Tensor, hooks: Iterable[RemovableHandle]) -> None:
    """Run `model` on images, float32 [N, 3, H, W], for what its hooks see; they are taken off again, also if it fails."""
    hooks = list(hooks)
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


def calibrate(prepared: nn.Module, images: Tensor, batch_size: int = 128) -> None:
    """Show images, float32 [N, 3, H, W], normalised, to the observers."""
    prepared.eval()
    with torch.inference_mode():
        for batch in images.split(batch_size):
            prepared(batch)


def module_predictor(model: nn.Module) -> Predictor:
    """Wrap a module as a predictor: images float32 [N, 3, 32, 32] to logits float32 [N, 10], both numpy arrays.

    The module is put in eval mode and runs where its parameters are.
    """
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def predictor(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return predictor
