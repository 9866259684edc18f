"""Ranges that leave extreme images out: one rule, for the observers of every tool."""

from typing import Any

import torch
from torch import Tensor

TAIL = 0.05  # share of the images that may reach beyond a range, at either end


def range_of_most(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The range that holds, at either end, the values of 95 % of the images.

    lows, highs: the smallest and the largest value of each image, float32 [N]. Returns two scalars.
    """
    return lows.quantile(TAIL), highs.quantile(1 - TAIL)


class MostImages:
    """Makes a MinMaxObserver, of torch.ao or of torchao, hold 95 % of the images: what single images have beyond it is clipped.

    An image that is extreme is so in most of its values: leaving out a share of the values does not leave it out.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what that observer takes."""
        super().__init__(*args, **kwargs)
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Record the extremes of each image in `x`, [N, ...], and return it."""
        values = x.detach().float().flatten(1)
        self.lows.append(values.amin(1))
        self.highs.append(values.amax(1))
        low, high = range_of_most(torch.cat(self.lows), torch.cat(self.highs))
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        return x
