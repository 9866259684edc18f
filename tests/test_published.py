import json

import pytest
import torch

from helpers.files import StudyError
from helpers.report.records import read_record, save_record, write_record
from helpers.train.data import load_data
from helpers.train.models import build_model
from helpers.train.published import expand, load_published, pack, publish
from helpers.train.taps import restore_dead_taps, trim_dead_taps
from helpers.train.weights import save_weights, weights_path

MODEL = ("resnet18", "tuned", 0)


@pytest.fixture
def trained():
    """A ResNet18 whose live taps moved away from where they began, as those of a training do."""
    model = build_model("resnet18").eval()
    live = trim_dead_taps(model, 32)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    restore_dead_taps(model, live)
    return model


@pytest.fixture
def run_dir(tmp_path, trained):
    """A run directory that looks as notebook 1 leaves it."""
    save_weights(
        weights_path(str(tmp_path), *MODEL, "fp32"), trained.state_dict(), {"arch": "resnet18", "form": "float"}
    )
    dataset = load_data("digits", limit=64)
    parameters = {"data": "digits", "data_dir": "", "limit": 64, "epochs": 3}
    save_record(str(tmp_path), "01_train-resnet18-tuned-s0", parameters, (dataset.name, dataset.sha256), {})
    return str(tmp_path)


def test_what_is_expanded_is_the_whole_model_exact_but_for_rounding_to_float16(trained, tmp_path):
    packed = pack(trained)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert stored < 8.6e6  # of 44.7 MB
    again = expand(packed, "resnet18", 0, tmp_path).state_dict()
    untouched = build_model("resnet18").state_dict()
    for name, before in trained.state_dict().items():
        kept = before == untouched[name] if before.ndim == 4 else torch.zeros_like(before, dtype=torch.bool)
        rounded = before.half().float() if before.ndim > 1 else before
        assert torch.equal(again[name], torch.where(kept, before, rounded)), name


@pytest.mark.parametrize(("factor", "said"), [(1e7, "layer1.0.conv1.weight reaches .*65504"), (1e-7, "too small for")])
def test_weights_that_float16_cannot_hold_are_not_published(trained, factor, said):
    with torch.no_grad():
        trained.layer1[0].conv1.weight.mul_(factor)
    with pytest.raises(StudyError, match=said):
        pack(trained)


def test_a_published_file_says_how_it_came_to_be_and_gives_the_accuracy_that_it_names(run_dir, tmp_path):
    path, found = publish(run_dir, *MODEL, tmp_path / "there" / "resnet18.safetensors")
    model, facts = load_published(str(path), *MODEL, "digits")
    dataset = load_data("digits", limit=64)
    with torch.inference_mode():
        predicted = model(dataset.normalise(dataset.test.images)).argmax(1)
    assert int((predicted == dataset.test.labels).sum()) == found.correct == int(facts["correct"])
    record = json.loads((tmp_path / "records" / "01_train-resnet18-tuned-s0.json").read_text())["run"]
    assert (facts["epochs"], facts["commit"], facts["images"]) == (3, record["commit"], "digits-first64")
    assert facts["images_sha256"] == dataset.sha256 and len(facts["file_sha256"]) == 64


def test_a_start_from_another_model_or_data_set_or_from_nothing_ends_in_a_sentence(run_dir, tmp_path):
    path = str(publish(run_dir, *MODEL, tmp_path / "there" / "resnet18.safetensors")[0])
    asked = dict(zip(("arch", "recipe", "seed"), MODEL, strict=True)) | {"data": "digits"}
    for name, value in {"arch": "resnet34", "recipe": "as_run", "seed": 1, "data": "cifar10"}.items():
        with pytest.raises(StudyError, match=f"holds a model with {name} {asked[name]}, but {name} is {value}"):
            load_published(path, **asked | {name: value})
    with pytest.raises(StudyError, match="there has resnet18. Take another model, or start_from: random"):
        load_published(str(tmp_path / "there" / "no.safetensors"), **asked)
    with pytest.raises(StudyError, match="is not a published model"):
        load_published(str(weights_path(run_dir, *MODEL, "fp32")), **asked)


def test_a_run_whose_images_are_not_these_is_not_published(run_dir, tmp_path):
    path = tmp_path / "records" / "01_train-resnet18-tuned-s0.json"
    record = read_record(path)
    record["run"]["data"]["sha256"] = "ab" * 32
    write_record(path, record)
    with pytest.raises(StudyError, match="set CIFAR10_ROOT to the images of the training"):
        publish(run_dir, *MODEL, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(StudyError, match="run notebook 1"):
        publish(str(tmp_path / "nowhere"), *MODEL)
