"""`make bench`: is the study's own code in the way? Ratios, measured side by side in one run; it judges nothing.

Absolute speeds change with machine and weather, so every line is a ratio of two things measured in turns, and the median
over rounds is shown. CIFAR-10 is read if it is at hand, else the digits, repeated to as many images.
"""

import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers.files import StudyError
from helpers.quantize.arms import LEGACY, NO_LEGACY
from helpers.quantize.nncf import quantize_openvino
from helpers.serve.export import SUFFIXES, convert_to_openvino, export_onnx, export_torchscript
from helpers.serve.load import NOTHING, SERVED, Server, Service
from helpers.serve.runtimes import load_predictor
from helpers.serve.timing import summarise, time_interleaved
from helpers.study.pipeline import read_notebook
from helpers.train.data import Dataset, Split, find_cifar10, load_data, load_parquet
from helpers.train.models import build_model
from helpers.train.training import RECIPES, fit, resolve_precision
from helpers.train.weights import save_weights

BATCH, STEPS, ROUNDS = 128, 24, 3
RECIPE = RECIPES["tuned"]["first"]


def bench_data() -> Dataset:
    """CIFAR-10 where it lies on this machine, else the digits; as many training images as the rounds need."""
    from dataclasses import replace

    try:
        here = find_cifar10("")[1] is not None
    except StudyError:
        here = False
    dataset = load_data("cifar10" if here else "digits")
    copies = -(-BATCH * STEPS // len(dataset.train))
    images, labels = dataset.train.images.repeat(copies, 1, 1, 1), dataset.train.labels.repeat(copies)
    return replace(dataset, train=Split(images, labels).first(BATCH * STEPS), validation=dataset.validation.first(1))


def fit_speed(dataset: Dataset) -> float:
    """Images per second of `fit`."""
    with tempfile.TemporaryDirectory() as folder:
        return fit(build_model("resnet18"), dataset, RECIPE, 1, 0, Path(folder) / "c.pt", "bench")[0][
            "images_per_second"
        ]


def _steps(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Images per second of forward, backward, step over `batches` of (images, labels)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where `fit` trains
    model.train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        RECIPE.learning_rate,
        RECIPE.momentum,
        weight_decay=RECIPE.weight_decay,
        nesterov=RECIPE.nesterov,
    )
    enabled = resolve_precision("auto") == "bf16"
    started, seen = time.perf_counter(), 0
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += len(labels)
    loss.item()  # a GPU has only been told what to do
    return seen / (time.perf_counter() - started)


def bare_speed(dataset: Dataset) -> float:
    """Images per second of forward, backward, step on one fixed batch: the most that `fit` could reach."""
    images = dataset.normalise(dataset.train.images[:BATCH]).contiguous(memory_format=torch.channels_last)
    return _steps(build_model("resnet18"), [(images, dataset.train.labels[:BATCH])] * STEPS)


def loader_speed(dataset: Dataset) -> float:
    """Images per second of the usual loop: DataLoader with two workers and torchvision transforms, image by image."""
    from torchvision import transforms

    class Pictures(torch.utils.data.Dataset):
        transform = transforms.Compose(
            [
                *(transforms.ToPILImage(), transforms.RandomCrop(32, 4, padding_mode="reflect")),
                *(
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(dataset.mean, dataset.std),
                ),
            ]
        )

        def __len__(self) -> int:
            return len(dataset.train)

        def __getitem__(self, index: int):
            return self.transform(dataset.train.images[index]), dataset.train.labels[index]

    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True, num_workers=2)
    speed = _steps(build_model("resnet18"), loader)
    # PyTorch leaves a handler for processes that end, and what (d) loads leaves a stack for handlers that is no memory any
    # more: the next process to end would end this one with a segmentation fault.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return speed


def int8_rows(dataset: Dataset, folder: Path) -> dict[str, float]:
    """Median ms of ResNet18 at batch 1 for eager FP32 and every INT8 row; latency does not depend on the weights' values."""
    from helpers.quantize.arms import ENGINES, QCONFIGS, calibrate, convert, fuse, prepare

    model = build_model("resnet18").eval()
    images = dataset.normalise(dataset.train.images[:64])
    fused = fuse(model)
    prepared = prepare(fused, QCONFIGS["histogram_per_channel"])
    calibrate(prepared, images)
    quantized = convert(prepared, ENGINES[0])
    save_weights(folder / "fp32.safetensors", model.state_dict(), {"arch": "resnet18", "form": "float"})
    made = {"arch": "resnet18", "form": "prepared", "qconfig": "histogram_per_channel"}
    save_weights(folder / "ptq.safetensors", prepared.state_dict(), made)
    export_torchscript(quantized, folder / "ptq.pt")
    for name, module in (("fp32", model), ("ptq", quantized)):
        export_onnx(module, folder / f"{name}.onnx")
        convert_to_openvino(folder / f"{name}.onnx", folder / f"{name}.xml")
    quantize_openvino(folder / "fp32.xml", images, folder / "ptq_nncf.xml")
    threads = torch.get_num_threads()
    predictors = {"eager FP32": load_predictor(folder / "fp32.safetensors", "eager", threads)}
    for engine in ENGINES:
        predictors[f"eager INT8 {engine}"] = load_predictor(folder / "ptq.safetensors", "eager", threads, engine)
        predictors[f"TorchScript INT8 {engine}"] = load_predictor(folder / "ptq.pt", "torchscript", threads, engine)
    predictors["ONNX Runtime INT8"] = load_predictor(folder / "ptq.onnx", "onnxruntime", threads)
    predictors["OpenVINO INT8"] = load_predictor(folder / "ptq.xml", "openvino", threads)
    predictors["OpenVINO INT8 (NNCF)"] = load_predictor(folder / "ptq_nncf.xml", "openvino", threads)
    times = time_interleaved(predictors, images[:1].numpy(), 50, 0)
    return {name: summarise(values)["median_ms"] for name, values in times.items()}


def load_rows(folder: Path) -> pd.DataFrame:
    """Memory of a process that serves ResNet18 at 32x32 in each runtime, and what the load generator itself takes.

    `nothing` is a model that does nothing: its MB are those of Python and numpy, its ms those of the generator. Columns:
    resident MB, images a second call after call, and p50 and p99 ms at 20 random arrivals a second.
    """
    model = build_model("resnet18").eval()
    save_weights(folder / "fp32.safetensors", model.state_dict(), {"arch": "resnet18", "form": "float"})
    export_onnx(model, folder / "fp32.onnx")
    convert_to_openvino(folder / "fp32.onnx", folder / "fp32.xml")
    quantize_openvino(folder / "fp32.xml", torch.randn(16, 3, 32, 32), folder / "ptq_nncf.xml")
    rows = []
    for name in (NOTHING, *SERVED):
        arm, _, runtime = name.rpartition("-")
        service = Service(str(folder / f"{arm}{SUFFIXES.get(runtime, '')}"), runtime, 32, threads=1)
        with Server(service) as server:
            load, hot = server.loaded(20, 5, 0), server.hot(0.5)
        rows.append([name, load["memory_bytes"] / 1e6, hot["images_per_second"], load["p50_ms"], load["p99_ms"]])
    return pd.DataFrame(rows, columns=["served", "MB", "images/s", "p50 ms", "p99 ms"])


def wall_time(run: Path) -> pd.DataFrame:
    """Where the time of a study went: a line for each executed notebook of `run`, the longest first, in seconds.

    Columns: seconds; kernel (starting and stopping it); imports (the cells that begin with one); slowest (the longest other
    cell) and its first line.
    """
    rows = []
    for path in sorted((run / "notebooks").glob("*.ipynb")):
        notebook = read_notebook(path)
        total = notebook.metadata.get("papermill", {}).get("duration")
        if total is None:
            continue
        cells = [
            (cell.metadata.get("papermill", {}).get("duration") or 0.0, cell.source.strip().splitlines()[0])
            for cell in notebook.cells
            if cell.cell_type == "code"
        ]
        imports = sum(took for took, line in cells if line.startswith(("import ", "from ")))
        slowest, line = max((of for of in cells if not of[1].startswith(("import ", "from "))), default=(0.0, ""))
        kernel = total - sum(took for took, _ in cells)
        rows.append([path.stem, total, kernel, imports, slowest, line[:60]])
    columns = ["notebook", "seconds", "kernel", "imports", "slowest", "its first line"]
    return pd.DataFrame(rows, columns=columns).sort_values("seconds", ascending=False, ignore_index=True)


def step_times(executed: Path) -> dict[str, float]:
    """Seconds of each step of a notebook that papermill executed: its headings, and what its cells took under each."""
    steps: dict[str, float] = {}
    for cell in read_notebook(executed).cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            steps |= {title: 0.0 for title in titles}
        elif steps:
            steps[[*steps][-1]] += cell.metadata.get("papermill", {}).get("duration") or 0.0
    return steps


def your_model_times(folder: Path) -> dict[str, float]:
    """The same for notebook 10 with torchvision's ResNet50 at 224x224."""
    import papermill

    given = {"model": "torchvision:resnet50", "run_dir": str(folder / "run")}
    executed = folder / "10_your_model.ipynb"
    papermill.execute_notebook("notebooks/10_your_model.ipynb", executed, given, progress_bar=False, log_output=False)
    return step_times(executed)


def main() -> None:
    """Print the ratios, and where the last study spent its time."""
    dataset = bench_data()
    print(f"{dataset.name}, ResNet18, {torch.get_num_threads()} threads, batch {BATCH}, {STEPS} steps, {ROUNDS} rounds")
    bare_speed(dataset)
    rounds = [(fit_speed(dataset), bare_speed(dataset), loader_speed(dataset)) for _ in range(ROUNDS)]
    print(f"(a) fit / bare forward-backward-step, images per second: {np.median([f / b for f, b, _ in rounds]):.3f}")
    print(f"(b) fit / DataLoader with 2 workers, images per second:  {np.median([f / w for f, _, w in rounds]):.3f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if dataset.name.startswith("cifar10") and find_cifar10("")[0] == "parquet":
            seconds = []
            for _ in range(2):
                started = time.perf_counter()
                load_parquet(find_cifar10("")[1], folder)
                seconds.append(time.perf_counter() - started)
            print(
                f"(c) 60,000 images from parquet: cold {seconds[0]:.1f} s, cached {seconds[1]:.2f} s, ratio {seconds[0] / seconds[1]:.0f}"
            )
        else:
            print("(c) load of 60,000 images from parquet: not measured, CIFAR10_ROOT names no parquet files")
        rows = int8_rows(dataset, folder) if LEGACY else {}
        yours = your_model_times(folder)
    if not LEGACY:
        print(f"(d) INT8 beside eager FP32: not measured, {NO_LEGACY}")
    for name, milliseconds in rows.items():
        print(f"(d) {name:26s} {milliseconds:7.3f} ms, {rows['eager FP32'] / milliseconds:5.1f} x eager FP32")
    with tempfile.TemporaryDirectory() as name:
        print("(f) served by a process of its own, 1 thread; p50 and p99 ms at 20 random arrivals a second")
        print(load_rows(Path(name)).to_string(index=False, float_format="{:.2f}".format))
    print(f"(g) notebook 10, ResNet50 at 224x224: {sum(yours.values()):.0f} s")
    for step, seconds in yours.items():
        print(f"(g) {step:40s} {seconds:6.1f} s")
    runs = sorted(Path("runs").glob("*/book/_build/html/index.html"), key=lambda page: page.stat().st_mtime)
    if not runs:
        print("(e) wall time by notebook: not measured, no study has been run to its end (make study)")
        return
    run = runs[-1].parents[3]
    times = wall_time(run)
    print(
        f"(e) {run}: {times.seconds.sum():.0f} s of notebooks, {times.kernel.sum():.0f} of them to start and stop kernels,"
    )
    print(f"    {times.imports.sum():.0f} to import")
    print(times.to_string(index=False, float_format="{:.1f}".format))


if __name__ == "__main__":
    main()
