"""The figures of the study, drawn from its tables and returned; as wide as a phone, so that their text can be read there.

Of what was not measured there is no figure: None.
"""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from helpers.report import tables
from helpers.report.plots import log_ticks
from helpers.report.results import MARGIN, Results
from helpers.report.schema import ENOUGH, OBSERVERS, RUNTIMES

WIDTH = 5.5  # inches
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")


def _figure(width: float, height: float) -> Figure:
    """A figure that a notebook shows once, as what a cell returns: pyplot, which would show it again, has let go of it."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def _panels(names: list[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    """One panel for each name, below each other."""
    figure = _figure(WIDTH, height * len(names))
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
    return figure, dict(zip(names, axes, strict=True))


def tradeoff(results: Results) -> Figure | None:
    """What quantization changed against latency, one panel an architecture; in colour the plain paths and the fastest row.

    Height: points over the row's own FP32 control with 95 % interval, logarithmic beyond one point either way.
    """
    of = results.candidates
    of = of[of.batch == results.batch]
    if of.empty:
        return None
    headline, choices = tables.headline(results), tables.choices(results)
    named = pd.concat([headline, choices[choices.need == "lowest latency"]]) if len(choices) else headline
    archs = sorted(of.arch.unique())
    figure, panels = _panels([tables.model_label(arch) for arch in archs], 4.4)
    for arch, (name, axis) in zip(archs, panels.items(), strict=True):
        grey = of[of.arch == arch]
        for int8, label, marker in ((False, "other rows in FP32", "s"), (True, "other rows in INT8", "o")):
            kind = grey[grey.int8 == int8]
            axis.scatter(kind.ms, kind.change, 18, "silver", marker=marker, label=label)
        for number, row in enumerate(named[named.model == name].drop_duplicates("path").to_dict("records")):
            error = [[row["points"] - row["points low"]], [row["points high"] - row["points"]]]
            looks = {"fmt": MARKERS[number], "color": f"C{number}", "capsize": 3, "markersize": 7}
            axis.errorbar(row["ms"], row["points"], error, label=row["path"], **looks)
        axis.axhline(-100 * MARGIN, color="grey", linestyle="--")
        axis.set(xscale="log", xlabel="median ms", ylabel="points over its FP32")
        log_ticks(axis)
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5]))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, frameon=False)
    return figure


def collapse(results: Results) -> Figure | None:
    """PTQ's validation accuracy against the number of calibration images, by observer: every draw, and a line of means."""
    of = results.tables["calibration"]
    of = of[of.recipe == results.recipe]
    archs = sorted(of.arch.unique(), reverse=True)  # the deepest first
    if not archs:
        return None
    figure, panels = _panels([tables.model_label(arch) for arch in archs], 2.9)
    for arch, axis in zip(archs, panels.values(), strict=True):
        draws = of[(of.arch == arch) & (of.weights == "per_channel")]
        for number, (observer, label) in enumerate(OBSERVERS.items()):
            group = draws[draws.observer == observer]
            looks = {"color": f"C{number}", "marker": MARKERS[number]}
            axis.scatter(group.images, 100 * group.accuracy, 16, **looks)
            means = 100 * group.groupby("images").accuracy.mean()
            axis.plot(means.index, means, **looks, markersize=4, label=label)
        fp32 = of[(of.arch == arch) & (of.observer == "")].accuracy
        axis.axhline(100 * fp32.mean(), color="grey", linestyle="--", label="FP32")
        axis.set(xscale="log", ylim=(0, 100), xlabel="calibration images", ylabel="accuracy, %")
        log_ticks(axis)
    next(iter(panels.values())).legend(fontsize=7.5, loc="upper center", ncols=2)
    return figure


def qat(results: Results) -> Figure | None:
    """QAT minus PTQ of FP32 that trained as long, in eager PyTorch, with 95 % intervals; grey: within half a point."""
    of = tables.qat(results)
    if of.empty:
        return None
    figure = _figure(WIDTH, 1 + 0.55 * len(of))
    axis = figure.subplots()
    names = [f"{row.model}\n{row.QAT}" for row in of.itertuples()]
    error = [of["points"] - of["points low"], of["points high"] - of["points"]]
    axis.errorbar(of["points"], names, xerr=error, fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.axvspan(-100 * MARGIN, 100 * MARGIN, color="grey", alpha=0.3)
    axis.set(xlabel="points over PTQ of FP32 trained as long")
    return figure


def carry_over(results: Results) -> Figure | None:
    """How many times faster than eager FP32, by image size: in a hot loop (solid) and after 10 ms of rest (dashed)."""
    of = results.carried[(results.carried.batch == 1) & results.carried.pace.isin(["hot", "idle_10"])]
    of = of[of.threads == of.threads.max()]
    archs = sorted(of.arch.unique())
    if not archs:
        return None
    figure, panels = _panels([tables.model_label(arch) for arch in archs], 3)
    for arch, axis in zip(archs, panels.values(), strict=True):
        for number, (arm, runtime) in enumerate(tables.PLAIN[1:]):
            for pace, line in (("hot", "-"), ("idle_10", "--")):
                row = of[(of.arch == arch) & (of.arm == arm) & (of.runtime == runtime) & (of.pace == pace)]
                if row.empty:
                    continue
                row = row.sort_values("size")
                error = [row.speedup - row.speedup_low, row.speedup_high - row.speedup]
                label = tables.path_label(row.iloc[0].to_dict()) + ("" if pace == "hot" else ", rested")
                axis.errorbar(row["size"], row.speedup, error, fmt=f"{MARKERS[number]}{line}", color=f"C{number}", label=label, capsize=3)  # fmt: skip
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="height and width of the image, pixels", ylabel="times faster than PyTorch FP32")
        axis.set_xticks(sorted(of["size"].unique()))
    figure.legend(*axis.get_legend_handles_labels(), fontsize=7.5, loc="outside lower center", ncols=2)
    return figure


def load(of: pd.DataFrame) -> Figure | None:
    """Latency of the slowest hundredth at random arrivals against requests a second, one panel an image size.

    of: rows of load, of one model. A colour for each path, a line for each way to share the cores; each ends near its capacity.
    """
    of = of[of.pace.str.startswith("load_") & (of.n >= ENOUGH)]
    if of.empty:
        return None
    figure, panels = _panels([f"{size}x{size} pixels" for size in sorted(of["size"].unique())], 3.6)
    ways = [*of[["streams", "processes", "setting"]].drop_duplicates().itertuples(index=False, name=None)]
    paths = [*of[["arm", "runtime"]].drop_duplicates().itertuples(index=False, name=None)]
    for size, axis in zip(sorted(of["size"].unique()), panels.values(), strict=True):
        keys = ["arm", "runtime", "streams", "processes", "setting"]
        for (arm, runtime, *way), group in of[of["size"] == size].groupby(keys, sort=False):
            color, line = f"C{paths.index((arm, runtime))}", LINES[ways.index(tuple(way)) % len(LINES)]
            group = group.sort_values("rate")
            axis.plot(
                group.rate, group.p99_ms, line, color=color, marker=MARKERS[ways.index(tuple(way)) % len(MARKERS)]
            )
        axis.set(xscale="log", yscale="log", xlabel="requests a second", ylabel="99th percentile, ms")
        log_ticks(axis, "xy")
    names = [tables.path_label({"arm": arm, "runtime": runtime, "engine": ""}) for arm, runtime in paths]
    handles = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(names)]
    for number, (streams, processes, setting) in enumerate(ways):
        label = f"streams {streams}, processes {processes}" + (f", {setting}" if setting else "")
        looks = {"color": "grey", "linestyle": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
        handles.append(Line2D([], [], label=label, **looks))
    figure.legend(handles=handles, fontsize=7.5, loc="outside lower center", ncols=2)
    return figure


def machines(results: Results) -> Figure | None:
    """Speed-up over eager FP32 of the same paths on each machine that timed them, with 95 % intervals."""
    of = tables.machines(results)
    if of.empty:
        return None
    of = of[of.path != f"{RUNTIMES['eager']}: FP32"]
    shared = of.groupby("model").machine.nunique()
    names = sorted(shared.index[shared > 1])
    if not names:
        return None
    figure, panels = _panels(names, 3)
    for name, axis in panels.items():
        wide = of[of.model == name]
        for number, (machine, rows) in enumerate(wide.groupby("machine")):
            places = pd.Categorical(rows.path, wide.path.unique()).codes + 0.12 * number
            error = [rows.times - rows["times low"], rows["times high"] - rows.times]
            axis.errorbar(rows.times, places, xerr=error, fmt=MARKERS[number], capsize=3, label=fill(machine, 60))
        axis.set_yticks(range(wide.path.nunique()), wide.path.unique())
        axis.invert_yaxis()
        axis.set(xlabel="times faster than PyTorch FP32")
    handles = {
        label: handle
        for axis in panels.values()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center")
    return figure


def bit_widths(results: Results) -> Figure | None:
    """Accuracy of QAT and of PTQ of FP32 that trained as long, by bits of weights and activations."""
    of = tables.bit_widths(results)
    if of.empty:
        return None
    figure = _figure(WIDTH, 3)
    axis, places = figure.subplots(), np.arange(len(of))
    for number, column in enumerate(("QAT, %", "PTQ, %", "PTQ, default observers, %")):
        axis.plot(places, of[column], f"{MARKERS[number]}-", label=column.removesuffix(", %"))
    axis.set_xticks(places, of.width)
    axis.legend(fontsize=8)
    axis.set(xlabel="bits of weights and activations", ylabel="accuracy, %")
    return figure


sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.85)
