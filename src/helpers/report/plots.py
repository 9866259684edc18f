"""What figures of more than one notebook share: whole ones, drawn from arrays or frames and returned, and the ticks of an axis."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

sns.set_theme(style="whitegrid", palette="colorblind")


def image_grid(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Figure:
    """Show images uint8 [N, 3, H, W] in rows of `columns`, each with its title."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.transpose(1, 2, 0))
        axis.set_title(title, fontsize=7)
    figure.tight_layout()
    return figure


def training_curves(histories: Mapping[str, list[dict[str, float]]]) -> Figure:
    """Loss and validation accuracy by epoch, one line for each arm. histories: arm -> rows as `training.fit` returns them."""
    frame = pd.DataFrame([row | {"arm": arm} for arm, history in histories.items() for row in history])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    if not frame.empty:
        frame["validation accuracy, %"] = 100 * frame["val_accuracy"]
        sns.lineplot(frame, x="epoch", y="train_loss", hue="arm", marker="o", ax=axes[0])
        sns.lineplot(frame, x="epoch", y="validation accuracy, %", hue="arm", marker="o", ax=axes[1], legend=False)
        axes[0].set_ylabel("training loss")
    figure.tight_layout()
    return figure


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts of true class (rows) against predicted class (columns); truth, predicted: integers [N]."""
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (truth, predicted), 1)
    figure, axis = plt.subplots(figsize=(6.5, 5.2))
    sns.heatmap(
        counts, annot=True, fmt="d", cmap="Blues", cbar=False, xticklabels=classes, yticklabels=classes, ax=axis
    )
    axis.set(xlabel="predicted", ylabel="true")
    figure.tight_layout()
    return figure


def layer_bars(sqnr: Mapping[str, float]) -> Figure:
    """SQNR in dB of each layer, in order of execution. sqnr: layer -> dB as `eager.layer_sqnr` returns it."""
    figure, axis = plt.subplots(figsize=(max(7, 0.2 * len(sqnr)), 3.6))
    sns.barplot(x=list(sqnr), y=list(sqnr.values()), color=sns.color_palette()[0], ax=axis)
    axis.set(xlabel="", ylabel="SQNR, dB")
    axis.tick_params(axis="x", rotation=90, labelsize=7)
    figure.tight_layout()
    return figure


def log_ticks(axes: Axes, names: str = "x") -> None:
    """Label 1, 2 and 5 of each decade of logarithmic axes, as plain numbers; narrow spans have no power of ten to label.

    names: x, y or xy.
    """
    for name in names:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
