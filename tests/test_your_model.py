import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
from conftest import papermill
from PIL import Image
from torch import nn

from helpers.files import NotWritten, StudyError, refused, whole_file
from helpers.machine import check_threads
from helpers.report.choice import choose_way
from helpers.report.stats import sqnr_db
from helpers.serve import archives
from helpers.serve.archives import load_exported
from helpers.serve.candidates import WAYS, answers, float_onnx, make_candidate
from helpers.serve.foreign import of_module, open_model, torchvision_names
from helpers.serve.snippets import code_to_copy
from helpers.train.data import load_data
from helpers.train.pictures import fitted, load_pictures, resized

SIZE, NORMAL = 16, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Net(nn.Module):
    """A convolution, one ReLU that is called twice, squeeze and excitation, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm, self.relu, self.squeeze = nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, images):
        x = self.relu(self.norm(self.second(self.relu(self.first(images)))))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, images, mask):
        return (images * mask).mean((2, 3))


def net():
    torch.manual_seed(0)
    return Net().eval()


def exported(path, model=None, inputs=1, batch=1, size=SIZE):
    program = torch.export.export(model or net(), (torch.zeros(batch, 3, size, size),) * inputs)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("pt2") / "net.pt2")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    model = onnx.load(float_onnx(of_module("net", net(), SIZE), folder))
    path = folder / "net.onnx"
    for node in model.graph.node:  # an input of another name than the study's
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    model.graph.input[0].name = "pixels"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of images of several sizes and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16") * 4):
        pixels = draw.integers(0, 256, (20 + number, 30, 3), np.uint8)
        if mode == "I;16":
            picture = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 255)
        else:
            picture = Image.fromarray(pixels).convert(mode)
        path = folder / ("cat", "dog")[number % 2] / f"{number}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return folder


def test_every_way_serves_a_module_an_archive_and_an_onnx_file_alike(archive, onnx_file, tmp_path):
    images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = net()(images).detach().numpy()
    for number, model in enumerate(
        (of_module("net", net(), SIZE), open_model(str(archive)), open_model(str(onnx_file)))
    ):
        folder = tmp_path / str(number)
        assert (model.size, model.classes) == (SIZE, 5)
        for way in WAYS if number == 0 else [way for way in WAYS if way[1] != "inductor"]:  # which compiles for long
            candidate = make_candidate(*way, model, folder, images)
            if model.module is None and way[1] in ("eager", "eager_channels_last", "inductor"):
                assert candidate.reason == "An ONNX file holds no PyTorch model."
                continue
            try:
                found = answers(candidate.predictor(1), images.numpy(), 1)
            except StudyError as error:
                assert way[1] in ("openvino_bf16", "inductor") and ("bfloat16" in str(error) or "g++" in str(error))
                continue
            assert sqnr_db(expected, found) > (20 if way[0] != "fp32" or "bf16" in way[1] else 90), way
            layers = candidate.layers(images[:1].numpy())
            # Of a single image Inductor may make the linear layer code of its own, which has no kernel's name.
            seen = {0} if "eager" in way[1] else {3, 4} if way[1] == "inductor" else {4}
            assert len(layers) in seen, (way, layers)
            assert {layer["precision"] for layer in layers} <= {"float32" if way[0] == "fp32" else "int8", "float32"}
            assert way[0] == "fp32" or any(layer["precision"] == "int8" for layer in layers), way
            assert candidate.file_bytes > 2000


@pytest.mark.parametrize(
    ("way", "given"),
    [
        (("ptq_nncf", "openvino"), "archive"),
        (("ptq_ort_u8", "onnxruntime"), "onnx"),
        (("fp32", "eager"), "torchvision"),
    ],
)
def test_the_code_to_copy_runs_on_its_own_and_answers_as_the_file_it_describes(
    way, given, archive, onnx_file, pictures, tmp_path
):
    name = {"archive": str(archive), "onnx": str(onnx_file), "torchvision": "torchvision:squeezenet1_1"}[given]
    model = open_model(name, 0 if given != "torchvision" else 64)
    script = code_to_copy(way, model, name, str(pictures), NORMAL, 8, 1, 0)
    script += f"\nnp.savez({str(tmp_path / 'found.npz')!r}, logits=logits, images=np.concatenate(images))\n"
    alone(script, tmp_path)
    found = np.load(tmp_path / "found.npz")
    candidate = make_candidate(*way, model, tmp_path / "files", torch.from_numpy(found["images"]))
    expected = answers(candidate.predictor(1), found["images"][:1], 1)
    assert len(found["images"]) == 8 and sqnr_db(expected, found["logits"]) > 15


def alone(script, folder):
    """Run a script where this project cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (folder / "script.py").write_text("import sys\nsys.modules['helpers'] = None\n" + script)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_code_to_copy_is_python_without_this_project(archive, onnx_file):
    for given in (str(archive), str(onnx_file), "torchvision:googlenet", ""):
        model = of_module("net", net(), SIZE) if given[:1] in ("", "t") else open_model(given)
        for way in WAYS:
            script = code_to_copy(way, model, given, "", NORMAL, 8, 1, 0)
            compile(script, "script", "exec")
            assert "helpers" not in script and "$" not in script


def rewritten(archive, path, changes=None, added=()):
    """The archive with changes to the text of its program, and with more entries."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            for before, after in (changes or {}).items() if name.endswith("model.json") else ():
                assert before.encode() in content
                content = content.replace(before.encode(), after.encode())
            new.writestr(name, content)
        for name, content in added:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{name}", content)
    return path


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_an_archive_cannot_run_code(archive, tmp_path):
    marker, bad = tmp_path / "ran", tmp_path / "bad.pt2"
    assert load_exported(archive).graph_signature.user_inputs
    relu = "torch.ops.aten.relu.default"
    for changes, added in (
        ({relu: "torch.os.system"}, ()),
        ({relu: "torch.ops.load_library"}, ()),
        ({relu: "_operator.attrgetter"}, ()),
        ({relu: "torch.ops.aten.relu.__class__"}, ()),
        ({"builtins.dict": "collections.defaultdict"}, ()),
        ({}, [("data/aotinductor/model/x.so", b"")]),
        ({}, [("data/constants/custom_obj_0", b"")]),
        ({}, [("data/weights/model.pt", b"")]),
    ):
        with pytest.raises(StudyError, match="asks for|is no program"):
            load_exported(rewritten(archive, bad, changes, added))
    with pytest.raises(StudyError, match="is no program"):  # two readers may take one each
        load_exported(rewritten(archive, bad, added=[("models/model.json", b"{}")]))
    for text in (f"open('{marker}', 'w')", "exit()", "().__class__", "x.y", "[1]", "Symbol('a b')", "lambda: 1"):
        assert not archives._is_formula(text), text
    for text in ("Symbol('s77', positive=True, integer=True)", "2*s77 + 1", "Max(1, s0//2)", "s0 < 4"):
        assert archives._is_formula(text), text


def test_an_archive_whose_sample_inputs_are_a_pickle_is_refused_and_nothing_runs(archive, tmp_path):
    marker, bad, evil = tmp_path / "ran", tmp_path / "bad.pt2", tmp_path / "evil.pt"
    torch.save(Evil(marker), evil)
    assert load_exported(rewritten(archive, bad)).graph_signature.user_inputs
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            new.writestr(name, evil.read_bytes() if "sample_inputs" in name else old.read(name))
    with pytest.raises(StudyError, match="was not read"):
        load_exported(bad)
    assert not marker.exists() and torch.load.__module__ == "torch.serialization"


def test_a_model_that_cannot_be_compared_ends_in_a_sentence(tmp_path, archive, onnx_file):
    torch.save(net(), tmp_path / "pickled.pt")
    torch.save(net(), tmp_path / "pickled.pt2")
    (tmp_path / "text.onnx").write_text("no model")
    exported(tmp_path / "two.pt2", Pair(), inputs=2)
    exported(tmp_path / "four.pt2", batch=4)
    exported(tmp_path / "maps.pt2", nn.Sequential(nn.Conv2d(3, 4, 3)))
    for given, arguments, said in (
        ("torchvision:resnet5O", {}, "no classifier 'resnet5O'; near are .*resnet50"),
        ("resnet50", {}, "is no model here.*Did you mean torchvision:resnet50"),
        (str(tmp_path / "none.onnx"), {}, "no such file"),
        (str(tmp_path / "pickled.pt"), {}, "is unpickled to load it.*torch.export.save"),
        (str(tmp_path / "pickled.pt2"), {}, "is no program that torch.export.save wrote"),
        (str(tmp_path / "text.onnx"), {}, "is no ONNX model"),
        (str(tmp_path / "two.pt2"), {}, "takes 2 inputs"),
        (str(tmp_path / "four.pt2"), {}, "exported for 4 images a call"),
        (str(tmp_path / "maps.pt2"), {}, "logits .* are needed"),
        (str(archive), {"size": 64}, "size is 64, but net.pt2 was exported for 16x16"),
        (str(archive), {"pretrained": True}, "pretrained is True for net.pt2"),
        ("torchvision:alexnet", {"size": 16}, "does not take images of 16x16 pixels"),
    ):
        with pytest.raises(StudyError, match=said):
            open_model(given, **arguments)
    assert {"resnet50", "mobilenet_v3_large", "efficientnet_b0"} <= {*torchvision_names()}


def test_two_files_of_one_name_have_names_of_their_own(archive, tmp_path):
    other = Net().eval()
    second = exported(tmp_path / archive.name, other)
    names = {open_model(str(archive)).name, open_model(str(second)).name}
    assert len(names) == 2 and all(re.fullmatch(r"net_pt2_\w{8}", name) for name in names)


def test_pictures_of_any_size_and_mode_become_rgb_and_none_is_both_calibrated_with_and_scored(pictures):
    found = load_pictures(str(pictures), SIZE, 100, 0, *NORMAL)
    assert found.classes == ("cat", "dog") and (len(found.train), len(found.test)) == (22, 10)
    assert found.train.images.shape[1:] == (3, SIZE, SIZE) and found.train.images.dtype == torch.uint8
    assert {*found.train.labels.tolist()} == {0, 1}
    both = torch.cat([found.train.images, found.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 32
    deep = fitted(next(p for p in pictures.rglob("*.tiff") if Image.open(p).mode == "I;16"), SIZE)
    assert 80 < deep.mean() < 180 and (deep[0] == deep[2]).all()  # scaled, not clipped to white
    again = load_pictures(str(pictures), SIZE, 100, 0, *NORMAL)
    assert again.sha256 == found.sha256 != load_pictures(str(pictures), SIZE, 20, 0, *NORMAL).sha256


def test_a_folder_that_holds_no_set_of_images_ends_in_a_sentence(tmp_path):
    def folder(*names):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(root / name)
        return root

    broken = folder("a.png", "b.png")
    (broken / "a.png").write_bytes((broken / "a.png").read_bytes()[:40])
    hollow = folder("cat/a.png", "cat/b.png")
    (hollow / "dog").mkdir()
    for given, said in (
        (tmp_path / "nowhere", "is no folder"),
        (folder(), "has 0 images"),
        (folder("a.png"), "has 1 images"),
        (folder("a.png", "cat/b.png"), r"images beside the folders of its classes \(a.png\)"),
        (hollow, r"a folder without images \(dog\)"),
        (broken, "a.png is no whole picture"),
    ):
        with pytest.raises(StudyError, match=said):
            load_pictures(str(given), SIZE, 100, 0, *NORMAL)


def test_the_study_s_images_at_another_size_keep_their_labels():
    digits = load_data("digits")
    found = resized(digits, 48, 20, *NORMAL)
    assert found.test.images.shape == (20, 3, 48, 48) and (found.test.labels == digits.test.labels[:20]).all()
    assert found.mean == NORMAL[0]


def test_the_choice_is_the_fastest_that_is_not_shown_to_lose_and_agreement_decides_ties():
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(30)
    times = {"fp32": 10 * noise, "int8": 2 * noise, "as fast": 2.1 * noise, "broken": 1 * noise}
    right = {name: np.ones(1000, bool) for name in times}
    right["broken"] = np.arange(1000) >= 100
    agreement = {"fp32": 1.0, "int8": 0.99, "as fast": 0.995, "broken": 0.9}
    choice = choose_way(times, right, agreement, "fp32")
    assert choice.kept == ["fp32", "int8", "as fast"] and choice.tied == ["int8", "as fast"] and choice.way == "as fast"
    assert choice.changes["broken"].points == pytest.approx(-10)
    times["int8"] = times["int8"] / 2
    assert choose_way(times, right, agreement, "fp32").way == "int8"


def test_sqnr_is_what_it_is_on_paper():
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20)
    assert sqnr_db(np.ones(3), np.ones(3)) == float("inf")


def test_threads_beyond_the_quota_of_a_container_are_refused(monkeypatch):
    monkeypatch.setattr("helpers.machine.cpu_quota", lambda: 2.5)
    check_threads([1, 2])
    with pytest.raises(StudyError, match=r"threads is \[1, 3\], but this process may use 2.5 CPUs; give at most 2"):
        check_threads([1, 3])


def test_a_full_disk_ends_the_work_and_is_no_reason_of_a_row(tmp_path, monkeypatch):
    with pytest.raises(NotWritten), refused("The tool does not write it"):
        raise OSError(28, "No space left on device", "x.onnx")
    (tmp_path / "fp32.onnx").write_bytes(b"earlier")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(NotWritten, match="What was there before is unchanged"), whole_file(tmp_path / "fp32.onnx"):
        full()
    assert (tmp_path / "fp32.onnx").read_bytes() == b"earlier"
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: full())
    with pytest.raises(NotWritten):
        make_candidate("fp32", "onnxruntime", of_module("net", net(), SIZE), tmp_path / "new", torch.zeros(1))


def test_the_notebook_of_an_onnx_file_ends_with_a_record_and_code_and_harms_no_other_model_s(
    onnx_file, pictures, tmp_path
):
    run_dir = tmp_path / "run"
    small = f"{{images: {pictures}, threads: [1], rounds: 2, calibration_images: 8, calibration_sizes: [8], draws: 1}}"
    arguments = ["-y", small, "-p", "run_dir", run_dir]
    done = papermill("10_your_model", tmp_path / "out.ipynb", "-p", "model", onnx_file, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (run_dir / "records").glob("10_your_model-net_onnx_*.json")
    before = path.read_bytes()
    tables = json.loads(before)["tables"]
    of = {(row["arm"], row["runtime"]): row for row in tables["yours"]}
    assert [*of] == [*WAYS] and "holds no PyTorch model" in of["fp32", "eager"]["reason"]
    assert of["ptq_nncf", "openvino"]["int8_layers"] > 0 and of["ptq_nncf", "openvino"]["agreement"] is not None
    assert {row["pace"] for row in tables["yours_latency"]} == {"hot", "idle_10"} and tables["yours_calibration"]
    (script,) = (run_dir / "code").glob("*.py")
    (tmp_path / "alone").mkdir()
    alone(script.read_text(), tmp_path / "alone")
    failed = papermill("10_your_model", tmp_path / "out.ipynb", "-p", "model", "torchvision:resnet81", *arguments)
    assert failed.returncode != 0 and "near are" in failed.stderr.strip().splitlines()[-1]
    assert path.read_bytes() == before and len([*(run_dir / "records").iterdir()]) == 2
