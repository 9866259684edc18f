"""Bad input ends in one sentence that says what was given, before any work, and results stay as they are. SOAK=1 tries more."""

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SOAK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.files import StudyError
from helpers.quantize.arms import load_arm
from helpers.report.records import gather
from helpers.report.results import Results
from helpers.serve.foreign import open_model
from helpers.serve.runtimes import load_predictor
from helpers.study import book, canary
from helpers.study.parameters import LARGEST, LONGEST, PARAMETERS, check_parameters
from helpers.study.pipeline import NOTEBOOKS, declared_parameters, load_profile
from helpers.study.repository import rewrite
from helpers.study.run import run_study
from helpers.train import published
from helpers.train.data import check_available
from helpers.train.pictures import load_pictures
from helpers.train.weights import load_weights, save_weights

SENTENCE = 2_000  # characters that one may have, with all that is allowed


def told(**values):
    """Tell a notebook that declares these parameters other values."""
    cell = "\n".join(f"{name}: object = 0  # x" for name in values)
    return check_parameters({**values, "In": [cell]})


def profile(text):
    folder = Path("mine")
    folder.mkdir()
    (folder / "mine.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_profile("mine", folder)


def of_models(more):
    return f"models: [{{archs: [resnet18], recipes: [tuned], seeds: [0]}}]\n{more}"


def cifar10_root(path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CIFAR10_ROOT", path)
        check_available("cifar10")


def weights(content):
    Path("w.safetensors").write_bytes(content)
    return load_weights(Path("w.safetensors"))


def weights_of(**metadata):
    save_weights(Path("w.safetensors"), {"x": torch.zeros(1)}, metadata)
    return Path("w.safetensors")


def model_file(name, content=b"no model"):
    Path(name).write_bytes(content)
    return name


def pictures(*names):
    for name in names:
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(Path("pictures", name))
    return load_pictures("pictures", 16, 100, 0, (0.5,) * 3, (0.5,) * 3)


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])
# What is given, and words of the sentence that it ends in.
BAD = [
    (lambda: told(epochs="ten"), "epochs is 'ten'.*integer"),
    (lambda: told(epochs=10**9), "epochs is 1000000000.*less than or equal to 10000"),
    (lambda: told(epochs=10**5000), "epochs is a number of thousands of digits"),
    (lambda: told(epochs=float("nan")), "epochs is nan"),
    (lambda: told(seed=2**31), "seed is 2147483648.*less than or equal to 2147483647"),
    (lambda: told(seconds=float("inf")), "seconds is inf.*finite"),
    (lambda: told(width=-0.1), "width is -0.1.*greater than or equal to 0"),
    (lambda: told(threads=[0]), "threads.0 is 0.*greater than or equal to 1"),
    (lambda: told(threads=2), r"threads is 2; a list is needed.*\[2\]"),
    (lambda: told(sizes=[10**6]), "sizes.0 is 1000000.*less than or equal to 1024"),
    (lambda: told(batches=[]), r"batches is \[\].*at least 1"),
    (lambda: told(std=[0.0, 0.1, 0.1]), "std.0 is 0.0.*greater than 0"),
    (lambda: told(mean=[0.5]), "mean is .*red, green and blue"),
    (lambda: told(run_dir="runs/\0"), "run_dir is 'runs/.x00'.*printable"),
    (lambda: told(run_dir="x" * 300), "run_dir is 'xxx.*255 bytes"),
    (lambda: told(images="x/" * 600), "images is .*at most 1000 characters"),
    (lambda: told(arch=None), "arch is None.*'resnet18'"),
    (lambda: profile(""), "the content is None"),
    (lambda: profile("[1, 2]"), r"the content is \[1, 2\]"),
    (lambda: profile(b"\xff\xfe\x00"), "is not YAML"),
    (lambda: profile("models: &m [*m]"), "models.0 is "),
    (lambda: profile(of_models("common: {epochs: 2001-99-99}")), "is not YAML"),
    (lambda: profile(of_models(f"common: {{epochs: {'9' * 5000}}}")), "is not YAML"),
    (lambda: profile("[" * 400), "is not YAML"),
    (lambda: profile(of_models(BOMB)), "a0 is no key here"),
    (lambda: profile(of_models("common: {1: 2}")), "common.1.*is 1; "),
    (lambda: profile(of_models("notebooks: {01_train: [epochs]}")), r"notebooks.01_train is \['epochs'\]"),
    (lambda: run_study("quik", []), "profile is 'quik'; allowed are cifar10"),
    (lambda: run_study("../profiles/quick", []), "profile is '../profiles/quick'; allowed"),
    (lambda: run_study("quick\0", []), "profile is 'quick.x00'; allowed"),
    (lambda: book._command(["run", ".."]), "profile is '..'; allowed"),
    (lambda: book._command(["burn"]), "allowed are run PROFILE"),
    (lambda: canary._command(["one"]), "run directories PINNED NEWEST"),
    (lambda: published._command(["run", "resnet18", "tuned", "x"]), "RUN_DIR ARCH RECIPE SEED"),
    (lambda: rewrite("https://gitlab.com/a/b"), "must look like https://github.com/OWNER/NAME"),
    (lambda: rewrite("https://github.com/a/b\n"), "must look like"),
    (lambda: cifar10_root("/nowhere"), "No CIFAR-10 in '/nowhere' .from CIFAR10_ROOT"),
    (lambda: cifar10_root("x" * 5000), "'xxx.*cannot be looked at.*File name too long"),
    (lambda: cifar10_root("~nobody-here/x"), "cannot be looked at.*home directory"),
    (lambda: weights(b""), "w.safetensors is not a whole safetensors file"),
    (lambda: weights(b"\xff" * 64), "w.safetensors is not a whole safetensors file"),
    (lambda: load_weights(Path("none.safetensors")), "none.safetensors does not exist"),
    (lambda: load_arm(weights_of(arch="resnet19")), "does not say which arch it is"),
    (lambda: load_arm(weights_of(arch="resnet18")), "has the form ''"),
    (lambda: load_arm(weights_of(arch="resnet18", form="float")), "does not fit the model"),
    (lambda: load_predictor(Path(model_file("m.xml")), "openvino"), "openvino cannot read m.xml"),
    (lambda: load_predictor(Path(model_file("m.onnx")), "onnxruntime"), "onnxruntime cannot read m.onnx"),
    (lambda: load_predictor(Path(model_file("m.pt")), "torchscript"), "m.pt is damaged"),
    (lambda: load_predictor(Path(model_file("m.pt2")), "aotinductor"), "m.pt2 is damaged"),
    (lambda: open_model("resnet18 "), "is no model here.*torchvision:resnet18"),
    (lambda: open_model("torchvision:"), "torchvision has no classifier ''"),
    (lambda: open_model(model_file("m.onnx", b"")), "m.onnx is no ONNX model"),
    (lambda: open_model(model_file("m.pth")), "is unpickled to load it"),
    (lambda: open_model("~nobody-here/m.onnx"), "cannot be looked at.*home directory"),
    (lambda: load_pictures("~nobody-here", 16, 9, 0, (0.5,) * 3, (0.5,) * 3), "cannot be looked at"),
    (lambda: pictures("a.png"), "has 1 images"),
    (lambda: pictures("a.png", "b/c.png"), "images beside the folders"),
    (lambda: load_pictures("/dev/null", 16, 9, 0, (0.5,) * 3, (0.5,) * 3), "is no folder"),
    (lambda: gather(".", Path("results")), "There are no records in"),
    (lambda: Results.open("."), "has no results"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_ends_in_one_sentence_and_leaves_all_as_it_was(number, tmp_path, monkeypatch):
    call, said = BAD[number]
    for part in ("Snakefile", "profiles", "notebooks", "pyproject.toml"):
        (tmp_path / part).symlink_to(ROOT / part)
    kept = [tmp_path / name for name in ("runs/quick/records/r.json", "book/chapters/c.ipynb", "book/results/runs.csv")]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("kept")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=said) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < SENTENCE
    assert [file.read_text() for file in kept] == ["kept"] * 3


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("helpers.study.run", ["qu\u00efk"], "study: profile is 'qu\u00efk'; allowed are"),
        ("helpers.study.book", ["run", ".."], "book: profile is '..'; allowed are"),
        ("helpers.study.repository", [], "repository: URL is ''"),
    ],
)
def test_a_command_ends_with_that_sentence_and_a_code_that_is_not_zero(module, arguments, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code.startswith(said)  # a text is printed, and the code is 1 then


TEXTS = st.text(max_size=20) | st.sampled_from(["", "\0", "resnet18", "1e-3", "ten", "x" * 1001, "../..", "\ud800"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 10**30, -1, 0, True])
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none() | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=6,
)
ANY = VALUES | st.integers(0, 99) | st.floats(0, 1) | st.lists(st.integers(0, 3) | NUMBERS, max_size=3)
TRIES = settings(
    max_examples=500 if SOAK else 40,
    derandomize=not SOAK,  # else new ones each time
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def in_bounds(value):
    if isinstance(value, list):
        return all(map(in_bounds, value))
    if isinstance(value, str):
        return len(value) <= LONGEST
    return np.isfinite(value) and abs(value) <= max(1000 * LARGEST["seconds"], LARGEST["seed"])


@pytest.fixture(scope="module")
def _in_a_study(tmp_path_factory):
    """A folder of their own for what the parameters name: run_dir is made."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "Snakefile").touch()
    for part in ("profiles", "notebooks"):
        (folder / part).symlink_to(ROOT / part)
    return folder


@TRIES
@given(st.data())
def test_any_parameters_are_in_their_bounds_or_end_in_one_sentence(_in_a_study, data):
    os.chdir(_in_a_study)
    names = data.draw(st.lists(st.sampled_from(sorted(PARAMETERS)), min_size=1, max_size=4, unique=True))
    values = {name: data.draw(ANY) for name in names}
    values = {name: "runs/x" if name == "run_dir" and isinstance(v, str) else v for name, v in values.items()}
    try:
        found = told(**values)
    except StudyError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < SENTENCE
    else:
        assert all(map(in_bounds, found.values()))


NAMES = TEXTS | st.sampled_from(sorted(PARAMETERS)) | st.sampled_from(sorted(NOTEBOOKS))
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "models": VALUES | st.just([{"archs": ["resnet18"], "recipes": ["tuned"], "seeds": [0]}]),
        "common": VALUES | st.dictionaries(NAMES, VALUES, max_size=3),
        "notebooks": VALUES | st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=3), max_size=2),
        "experiments": VALUES,
    },
)


@TRIES
@given(content=CONTENTS | VALUES)
def test_any_profile_is_in_bounds_or_ends_in_one_sentence(_in_a_study, content):
    os.chdir(_in_a_study)
    folder = _in_a_study / "mine"
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump(content, allow_unicode=True)
    (folder / "any.yml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = load_profile("any", folder)
    except StudyError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < SENTENCE
    else:
        assert all(map(in_bounds, found.common.values()))
        assert {*found.common} <= {name for notebook in NOTEBOOKS for name in declared_parameters(notebook)}
