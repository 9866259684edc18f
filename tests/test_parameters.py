import pytest

from helpers.files import StudyError
from helpers.parameters import NOTEBOOKS, PARAMETERS, check_parameters, declared_parameters, load_profile

GOOD = {"arch": "resnet18", "epochs": 3}


def namespace(values, injected=""):
    return {"__annotations__": dict.fromkeys(GOOD), **GOOD, **values, "In": ["", f"# Parameters\n{injected}"]}


def test_good_parameters_come_back():
    assert check_parameters(namespace({}, 'arch = "resnet18"\n')) == GOOD


@pytest.mark.parametrize(
    ("values", "injected", "said"),
    [
        ({"epochs": "ten"}, "", "epochs is 'ten'.*integer"),
        ({"epochs": True}, "", "epochs is True"),
        ({"epochs": -1}, "", "epochs is -1.*greater than or equal to 0"),
        ({"arch": "resnet19"}, "", "arch is 'resnet19'.*'resnet18', 'resnet34' or 'resnet50'"),
        ({"epoch": 3}, "epoch = 3\n", "epoch is not a parameter of this notebook; it has arch, epochs"),
    ],
)
def test_bad_parameters_end_in_a_sentence(values, injected, said):
    with pytest.raises(StudyError, match=said):
        check_parameters(namespace(values, injected))


@pytest.mark.parametrize("name", ["smoke", "quick", "cifar10", "reference"])
def test_every_profile_uses_declared_parameters_only(name):
    profile = load_profile(name)
    for notebook in NOTEBOOKS:
        assert set(profile.arguments(notebook, name)) <= set(declared_parameters(notebook)) <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "archs: [resnet18]\nrecipes: [tuned]\nseeds: [0]\nnotebooks: {01_train: {epoch: 3}}",
            "epoch is not a parameter of 01_train",
        ),
        ("archs: [resnet18]\nrecipes: [tuned]\nseeds: [0]\nnotebooks: {01_train: {epochs: 1e1x}}", "epochs is '1e1x'"),
        ("archs: [resnet99]\nrecipes: [tuned]\nseeds: [0]", "archs.0 is 'resnet99'"),
        ("archs: [resnet18]\nrecipes: [tuned]\nseed: [0]", "seed"),
        ("archs: [", "is not YAML"),
    ],
)
def test_a_bad_profile_ends_in_a_sentence_that_names_the_file(tmp_path, text, said):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(StudyError, match=said):
        load_profile("mine", tmp_path)


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(StudyError, match="cifar10, quick, reference, smoke"):
        load_profile("quik")
