"""A damaged file of any format that is read ends in one sentence, or changes nothing. SOAK=1 damages more."""

import functools
import io
import json
import re
import shutil
import signal
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SOAK
from PIL import Image
from torch import nn

from helpers.files import StudyError, read_arrays, refused, whole_file
from helpers.report.records import gather, read_record, save_record
from helpers.report.results import Results
from helpers.report.rows import accuracy_row
from helpers.serve.export import convert_to_openvino, export_onnx, export_torchscript
from helpers.serve.foreign import open_model
from helpers.serve.runtimes import load_predictor
from helpers.study.book import copy_chapter
from helpers.study.console import last_lines
from helpers.study.pipeline import load_profile
from helpers.train.data import read_parquet
from helpers.train.pictures import fitted
from helpers.train.training import _stored
from helpers.train.weights import load_weights, save_weights

IMAGES = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
SECONDS = 20  # that one damaged file may take
OTHERS = (b"", b"{}", b"[]", b"null", b"PK\x03\x04", b"\x80\x04N.", bytes(100), b"a: [b", b'{"a": [1]}', b"\xe9\xe9")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 500)

    def forward(self, images):
        return self.fc(torch.relu(self.conv(images)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def as_bytes(arrays):
    return {name: (str(a.dtype), a.shape, np.asarray(a).tobytes()) for name, a in arrays.items()}


def write_weights(path):
    save_weights(path, net().state_dict() | {"n": torch.tensor(3)}, {"arch": "resnet18", "form": "float"})


def weights(path):
    state, metadata = load_weights(path)
    return as_bytes(state), metadata["form"]


def write_record_and_arrays(path):
    of = {"arch": "resnet18", "recipe": "tuned", "seed": 0}
    rows = {"accuracy": [accuracy_row(of, "fp32", "eager", "digits", 3, 4, (0.3, 0.95))]}
    arrays = {"fp32-eager": np.array([1, 2, 3, 4], np.uint8), "truth": np.arange(4, dtype=np.uint8)}
    save_record(str(path.parent), "01_train-resnet18-tuned-s0", {"seed": 0}, ("digits", "ab" * 32), rows, arrays)
    shutil.copy(path.parent / "records" / f"01_train-resnet18-tuned-s0{path.suffix}", path)


def record(path):
    found = read_record(path)
    (path.parent / "records").mkdir(exist_ok=True)
    shutil.copy(path, path.parent / "records")
    gather(str(path.parent), path.parent / "results")
    return json.dumps(found, sort_keys=True)


def write_checkpoint(path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.from_numpy(IMAGES)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with whole_file(path) as aside:
        torch.save({"key": "k", "history": [{"epoch": 1, "lr": 0.1}], "machines": [{"cpu": "x"}]} | states, aside)


def checkpoint(path):
    found = _stored(path)
    return as_bytes(found.pop("model")), repr(found)


@functools.cache
def onnx_file():
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(net(), Path(folder) / "m.onnx")
        return (Path(folder) / "m.onnx").read_bytes()


def write_foreign_onnx(path):
    """The study's file, changed by another tool, which keeps what it says of itself."""
    model = onnx.load_from_string(onnx_file())
    model.graph.doc_string = "mine"
    onnx.save(model, path)


def write_ir(path):
    path.with_suffix(".onnx").write_bytes(onnx_file())
    convert_to_openvino(path.with_suffix(".onnx"), path)
    path.with_suffix(".onnx").unlink()


def write_archive(path):
    torch.export.save(torch.export.export(net(), (torch.zeros(1, 3, 32, 32),)), path)


def answers_in(runtime):
    def read(path):
        predictor = load_predictor(path, runtime)
        with refused(f"{path} does not run"):
            return predictor(IMAGES).tobytes()

    return read


def answers_of_archive(path):
    with torch.inference_mode():
        return open_model(str(path)).module(torch.from_numpy(IMAGES)).numpy().tobytes()


def write_parquet(path):
    cells = []
    for encoding in ("PNG", "JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, encoding)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"img": cells, "label": [0, 1, 9]}), path)


def write_results(path):
    for file in (ROOT / "book" / "results").glob("*.*"):
        shutil.copy(file, path.parent)


def write_picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)


def write_notebook(path):
    new = nbformat.v4
    error = new.new_output("error", ename="E", evalue="x", traceback=["a", "b"])
    nbformat.write(new.new_notebook(cells=[new.new_code_cell("x = 1", outputs=[error])]), path)


def notebook(path):
    last_lines(path)
    copy_chapter(path, path.with_name("chapter.ipynb"))


# Of each format: the file, what writes it, what the study reads it with.
WRITTEN_BY_THE_STUDY = {
    "weights": ("w.safetensors", write_weights, weights),
    "record": ("r.json", write_record_and_arrays, record),
    "arrays": ("r.npz", write_record_and_arrays, lambda path: as_bytes(read_arrays(path))),
    "checkpoint": ("c.pt", write_checkpoint, checkpoint),
    "onnx": ("m.onnx", lambda path: path.write_bytes(onnx_file()), answers_in("onnxruntime")),
    "ir": ("m.xml", write_ir, answers_in("openvino")),
    "torchscript": ("m.pt", lambda path: export_torchscript(net(), path), answers_in("torchscript")),
    "archive": ("m.pt2", write_archive, answers_of_archive),
}
# Those of others: nothing in them says whether a value was changed.
OF_OTHERS = {
    "foreign_onnx": ("m.onnx", write_foreign_onnx, lambda path: open_model(str(path))),
    "parquet": ("test-0.parquet", write_parquet, lambda path: read_parquet([path])),
    "png": ("a.png", write_picture, lambda path: fitted(path, 16)),
    "jpeg": ("a.jpg", write_picture, lambda path: fitted(path, 16)),
    "profile": (
        "full.yml",
        lambda path: shutil.copy(ROOT / "profiles" / path.name, path),
        lambda path: load_profile("full", path.parent),
    ),
    "runs": ("runs.json", write_results, lambda path: Results.open(path.parent).data),
    "table": ("latency.csv", write_results, lambda path: Results.open(path.parent).rows),
    "notebook": ("n.ipynb", write_notebook, notebook),
}


def damage(path, draw):
    """Flip bits, cut, exchange two pieces, or put another file in its place; half of the time where headers are."""
    content = bytearray(path.read_bytes())
    n, how = len(content), draw.choice(["flip", "flip", "several", "cut", "swap", "other"])
    if how == "flip":
        at = draw.integers(n) if draw.random() < 0.5 else draw.integers(-min(n, 300), min(n, 300))
        content[at] ^= 1 << draw.integers(8)
    elif how == "several":
        for at in draw.integers(n, size=8):
            content[at] ^= 1 << draw.integers(8)
    elif how == "cut":
        del content[draw.choice([0, 1, n // 2, n - 1, draw.integers(n)]) :]
    elif how == "swap":
        size = min(n // 3, draw.choice([1, 8, 512]))
        first = draw.integers(0, n - 2 * size + 1)
        second = draw.integers(first + size, n - size + 1)
        one, other = content[first : first + size], content[second : second + size]
        content[first : first + size], content[second : second + size] = other, one
    else:
        content = OTHERS[draw.integers(len(OTHERS))]
    path.write_bytes(content)
    return how


@pytest.fixture
def _in_time():
    """A file that is read for longer than SECONDS fails the test."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_in_time")
@pytest.mark.parametrize("name", [*WRITTEN_BY_THE_STUDY, *OF_OTHERS])
def test_a_damaged_file_ends_in_one_sentence_or_changes_nothing(name, tmp_path):
    file, write, read = (WRITTEN_BY_THE_STUDY | OF_OTHERS)[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole / file)
    shutil.copytree(whole, tmp_path / "read")
    expected, refusals = read(tmp_path / "read" / file), 0
    if b"crc32" in (content := (whole / file).read_bytes())[:4096] + content[-64:]:
        # That of an earlier version, as book/weights, or of a study that was begun before, says no checksum and is read.
        before = re.sub(rb'\n "crc32": "\w{8}",', b"", content).replace(b"crc32", b"other")
        (tmp_path / "read" / file).write_bytes(before)
        assert read(tmp_path / "read" / file) == expected or name in OF_OTHERS
    # 235 exchanges the numbers that say how much an archive holds: it then reads as an empty one.
    for number in range(300) if SOAK else (*range(10), 235):
        draw = np.random.default_rng(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        for part in whole.glob("*.*"):
            shutil.copy(part, folder)
        how = damage(draw.choice(sorted(folder.glob(f"{Path(file).stem}.*"))), draw)
        signal.alarm(SECONDS)
        try:
            found = read(folder / file)
        except StudyError as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, (number, how, str(error))
        else:
            assert name in OF_OTHERS or found == expected, (number, how)
        signal.alarm(0)
        shutil.rmtree(folder)
    assert refusals


def test_the_weights_that_come_along_are_whole():
    for path in (ROOT / "book" / "weights").glob("*.safetensors"):
        load_weights(path)
