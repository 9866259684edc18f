"""Trimming: kernel taps that only ever multiply zero padding are cut, and restored where the whole kernel is wanted."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.files import StudyError


def trim_dead_taps(model: nn.Module, input_size: int) -> nn.Module:
    """Cut from every convolution, in a copy, the outer kernel taps that can only ever multiply zero padding.

    Decided from shapes alone, so the outputs are the same for any weights (floats up to the order of additions): on a map
    of 1x1 a padded 3x3 kernel sees its centre only. model: float, prepared, fused or INT8; input_size: height and width of
    the images in pixels, and the trimmed model is exact for this size only. A row of taps goes only if a smaller kernel
    with symmetric padding gives the same output size, which dilation and stride can prevent. Raises StudyError if
    input_size < 1.
    """
    if input_size < 1:
        raise StudyError(f"input_size is {input_size}; give the height and width of the images in pixels, at least 1.")
    trimmed = copy.deepcopy(model)
    for name, shape in _input_shapes(model, input_size).items():
        conv = trimmed.get_submodule(name)
        spatial = zip(shape, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        (top, bottom), (left, right) = (live_taps(*dimension) for dimension in spatial)
        conv.padding = (conv.padding[0] - top * conv.dilation[0], conv.padding[1] - left * conv.dilation[1])
        conv.kernel_size = (bottom + 1 - top, right + 1 - left)
        conv._reversed_padding_repeated_twice = [conv.padding[1]] * 2 + [conv.padding[0]] * 2
        window = (..., slice(top, bottom + 1), slice(left, right + 1))
        if isinstance(conv, nn.Conv2d):
            conv.weight = nn.Parameter(conv.weight.detach()[window].clone(), conv.weight.requires_grad)
        else:
            weight, bias = conv._weight_bias()
            conv.set_weight_bias(weight[window].contiguous(), bias)
    return trimmed


def restore_dead_taps(model: nn.Module, trimmed: nn.Module) -> None:
    """Give a float `model` all that `trimmed`, made of it by `trim_dead_taps`, has learned; the taps that it lacks stay as they are."""
    state = trimmed.state_dict()
    for name, conv in trimmed.named_modules():
        if isinstance(conv, nn.Conv2d):
            whole = model.get_submodule(name)
            (top, left), (height, width) = (
                (
                    (before - after) // step
                    for before, after, step in zip(whole.padding, conv.padding, conv.dilation, strict=True)
                ),
                conv.kernel_size,
            )
            weight = whole.weight.detach().clone()
            weight[..., top : top + height, left : left + width] = conv.weight.detach()
            state[f"{name}.weight"] = weight
    model.load_state_dict(state)


def live_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """First and last tap to keep of a convolution along one dimension of `size` pixels, counted from 0.

    The smallest run that holds every tap which ever touches a pixel, and that symmetric padding can serve.
    """

    def outputs(taps: int, pad: int) -> int:
        return (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1

    count = outputs(kernel, padding)
    starts = [stride * place - padding for place in range(count)]
    touched = [tap for tap in range(kernel) if any(0 <= start + dilation * tap < size for start in starts)]
    runs = [
        (first, last)
        for first in range(min(touched, default=0) + 1)
        for last in range(max(touched, default=0), kernel)
        if padding >= first * dilation and outputs(last + 1 - first, padding - first * dilation) == count
    ]
    return min(runs, key=lambda run: run[1] - run[0])


def _input_shapes(model: nn.Module, input_size: int) -> dict[str, tuple[int, int]]:
    """Height and width of what each zero-padded 2d convolution, float or INT8, is given; by name."""
    model = copy.deepcopy(model).eval()  # observers must not see the empty image
    shapes: dict[str, tuple[int, int]] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = (inputs[0].shape[-2], inputs[0].shape[-1])
            if shapes.setdefault(name, shape) != shape:
                raise StudyError(
                    f"{name} sees maps of {shapes[name]} and of {shape}; only a convolution of one size can be trimmed."
                )

        return hook

    for name, module in model.named_modules():
        convolution = isinstance(module, nn.Conv2d) or hasattr(module, "set_weight_bias")
        if convolution and getattr(module, "padding_mode", "") == "zeros" and not isinstance(module.padding, str):
            module.register_forward_pre_hook(look(name))
    image = next(model.parameters(), torch.empty(0)).new_zeros(1, 3, input_size, input_size)
    with torch.inference_mode():
        model(image)
    return shapes
