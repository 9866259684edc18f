from pathlib import Path

import pytest
from conftest import ROOT

from helpers.files import StudyError
from helpers.quantize.arms import ENGINES
from helpers.report.records import read_record, save_record, write_record
from helpers.study.parameters import PARAMETERS, check_parameters
from helpers.study.pipeline import NOTEBOOKS, declared_parameters, ensure, load_profile

ONE = "models: [{archs: [resnet18], recipes: [tuned], seeds: [0]}]"
GOOD = {"arch": "resnet18", "epochs": 3, "limit": 0}


def namespace(values, injected=""):
    cells = ["", 'arch: str = "resnet18"  # x\nepochs: int = 3  # x\nlimit: int = 0  # x', f"# Parameters\n{injected}"]
    return {**GOOD, **values, "In": cells}


def test_good_parameters_come_back():
    assert check_parameters(namespace({}, 'arch = "resnet18"\n')) == GOOD


@pytest.mark.parametrize(
    ("values", "injected", "said"),
    [
        ({"epochs": "ten"}, "", "epochs is 'ten'.*integer"),
        ({"epochs": True}, "", "epochs is True"),
        ({"epochs": -1}, "", "epochs is -1.*greater than or equal to 0"),
        ({"limit": 1}, "", "limit is 1; use 0 for all images, or at least 2"),
        ({"arch": "resnet19"}, "", "arch is 'resnet19'.*'resnet18', 'resnet34', 'resnet50' or 'resnet18_cifar'"),
        ({"epoch": 3}, "epoch = 3\n", "epoch is not a parameter of this notebook; it has arch, epochs"),
    ],
)
def test_bad_parameters_end_in_a_sentence(values, injected, said):
    with pytest.raises(StudyError, match=said):
        check_parameters(namespace(values, injected))


def test_the_cell_before_the_check_was_forgotten():
    with pytest.raises(StudyError, match="run the cell above"):
        check_parameters({"In": ["", "parameters = check_parameters(globals())"]})


def test_a_notebook_works_from_the_top_folder_wherever_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    check_parameters(namespace({}))
    assert Path.cwd() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="not found in .* start this notebook from within its folder"):
        check_parameters(namespace({}))


@pytest.mark.parametrize("name", ["smoke", "smoke_full", "quick", "full", "cifar10", "reference"])
def test_every_profile_is_a_good_one(name):
    assert load_profile(name).timed()


def test_every_parameter_of_a_notebook_has_a_meaning_and_a_range():
    for notebook in NOTEBOOKS:
        assert set(declared_parameters(notebook)) <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            ONE + "\nnotebooks: {01_train: {epoch: 3}}",
            "epoch is not a parameter of .*mine.yml: 01_train",
        ),
        (ONE + "\nnotebooks: {01_train: {epochs: 1e1x}}", "epochs is '1e1x'"),
        (ONE + "\nnotebooks: {01_train: {limit: 64}}", "01_train.limit is the same in all notebooks"),
        (ONE + "\nnotebooks: {02_ptq: {arch: resnet34}}", "arch is not a parameter of .*mine.yml: 02_ptq"),
        (
            ONE[:-2] + ", notebooks: {09_ptq_collapse: {epochs: 1}}}]",
            "09_ptq_collapse is not a parameter of .*mine.yml",
        ),
        ("models: [{archs: [resnet99], recipes: [tuned], seeds: [0]}]", "models.0.archs.0 is 'resnet99'"),
        ("models: [{archs: resnet18, recipes: [tuned], seeds: [0]}]", r"archs is 'resnet18'.* 'archs: \[resnet18\]'"),
        ("models: [{archs: [resnet18], recipes: [tuned], seed: [0]}]", "models.0.seeds is missing"),
        ("models: [{archs: [resnet18], recipes: [tuned], seeds: [0], epochs: 3}]", "models.0.epochs is no key here"),
        ("models: [", "is not YAML"),
    ],
)
def test_a_bad_profile_ends_in_a_sentence_that_names_the_file(tmp_path, text, said):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(StudyError, match=said):
        load_profile("mine", tmp_path)


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(StudyError, match="cifar10, full, quick, reference, smoke, smoke_full"):
        load_profile("quik")


def test_a_profile_trains_each_model_once_and_exports_those_of_its_first_recipe(tmp_path):
    blocks = "{archs: [resnet34, resnet18], recipes: [tuned], seeds: [1, 0]}, {archs: [resnet18], recipes: [tuned, as_run], seeds: [0]}"
    (tmp_path / "mine.yml").write_text(f"models: [{blocks}]")
    profile = load_profile("mine", tmp_path)
    assert [tuple(model.values()) for model in profile.trained()] == [
        *(("resnet34", "tuned", 1), ("resnet34", "tuned", 0), ("resnet18", "tuned", 1), ("resnet18", "tuned", 0)),
        ("resnet18", "as_run", 0),
    ]
    assert len(profile.served()) == 4 and [model["seed"] for model in profile.timed()] == [1, 1]


def test_a_record_of_other_images_or_another_quantization_is_not_reused(tmp_path):
    made = {"data": "digits", "limit": 256, "qconfig": "histogram", "calibration_images": 256, "engine": "fbgemm"}
    made |= {"precision": "bf16", "as_reference": True}
    save_record(str(tmp_path), "02_ptq-resnet18-tuned-s0", made, None, {})
    record = tmp_path / "records" / "02_ptq-resnet18-tuned-s0.json"
    # Other kernels are no other model, `auto` takes what there is, and of 256 images no more than these can calibrate.
    ensure(
        record,
        "02_ptq",
        made | {"calibration_images": 512, "engine": "x86", "epochs": 3, "precision": "auto", "as_reference": False},
    )
    whole = made | {"limit": 0, "calibration_images": 1257}  # of the 1,257 digits
    save_record(str(tmp_path), "02_ptq-resnet34-tuned-s0", whole, None, {})
    ensure(record.with_name("02_ptq-resnet34-tuned-s0.json"), "02_ptq", whole | {"calibration_images": 2000})
    for name, value in {"data": "cifar10", "qconfig": "minmax", "calibration_images": 64, "precision": "fp32"}.items():
        with pytest.raises(StudyError, match=f"{name} is {value!r}, but .* was made with {made[name]!r}"):
            ensure(record, "02_ptq", made | {name: value})


@pytest.mark.parametrize("anew", ["01_train", "03_qat"])
def test_a_record_is_made_again_when_what_it_was_made_from_was(tmp_path, monkeypatch, capsys, anew):
    made, settings = [], {"data": "digits", "limit": 0}
    monkeypatch.setattr("papermill.execute_notebook", lambda source, *_, **__: made.append(source.stem))
    record = tmp_path / "records" / "04_jit-resnet18-tuned-s0.json"
    before = [f"{notebook}-resnet18-tuned-s0" for notebook in ("01_train", "02_ptq", "03_qat")]
    for minute, run_id in enumerate([*before, record.stem, "01_train-resnet18-tuned-s1"]):
        save_record(str(tmp_path), run_id, settings, None, {})
        date_record(tmp_path / "records" / f"{run_id}.json", minute)
    exported = tmp_path / "weights" / "resnet18-tuned-s0-fp32.pt"
    exported.parent.mkdir()
    exported.touch()
    ensure(record, "04_jit", settings)
    assert made == []  # another seed's training is nothing to it
    date_record(tmp_path / "records" / f"{anew}-resnet18-tuned-s0.json", 5)
    ensure(record, "04_jit", settings)
    assert made == ["04_jit"] and f"is older than {anew}-resnet18-tuned-s0.json" in capsys.readouterr().out
    date_record(tmp_path / "records" / f"{anew}-resnet18-tuned-s0.json", 0)
    exported.unlink()  # as a finished study does
    ensure(record, "04_jit", settings)
    assert made == ["04_jit"] * 2 and "fp32.pt is missing" in capsys.readouterr().out


def date_record(path, minute):
    record = read_record(path)
    record["run"]["date"] = f"2026-01-01T00:{minute:02d}:00+00:00"
    write_record(path, record)


def test_an_engine_is_one_that_this_pytorch_has_and_without_any_no_work_begins(monkeypatch):
    given = {"In": ['engine: str = "fbgemm"  # x'], "engine": "qnnpack"}
    with pytest.raises(StudyError, match=f"engine is 'qnnpack'.*{'.*'.join(ENGINES)}"):
        check_parameters(given)
    monkeypatch.setattr("helpers.study.parameters.LEGACY", False)
    with pytest.raises(StudyError, match="legacy rows .* are left out"):
        check_parameters(given | {"engine": "fbgemm"})


def test_a_block_may_have_parameters_of_its_own_and_leave_a_notebook_out(tmp_path):
    of_r34 = "{archs: [resnet34], recipes: [tuned], seeds: [0], notebooks: {12_runtimes: {extra_epochs: 0}}, leave_out: [15_bit_widths]}"
    (tmp_path / "two.yml").write_text(f"models: [{ONE[9:-1]}, {of_r34}]\ncommon: {{extra_epochs: 2}}")
    profile = load_profile("two", tmp_path)
    small, large = profile.trained()
    epochs = [profile.arguments("12_runtimes", "two", **model)["extra_epochs"] for model in (small, large)]
    assert epochs == [2, 0] and profile.arguments("03_qat", "two", **large)["extra_epochs"] == 2
    assert profile.runs("15_bit_widths", small) and not profile.runs("15_bit_widths", large)
    (tmp_path / "bad.yml").write_text(ONE[:-2] + ", leave_out: [03_qat]}]")
    with pytest.raises(StudyError, match="bad.yml"):
        load_profile("bad", tmp_path)
