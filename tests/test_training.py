import copy
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.files import StudyError
from helpers.quantize.arms import QCONFIG_NAMES, freeze_near_the_end, fuse, fuse_for_qat, prepare_qat, qconfig_named
from helpers.report.records import save_record
from helpers.train.data import Split, load_data
from helpers.train.models import build_model
from helpers.train.training import RECIPES, Recipe, _fit_key, evaluate, fit, resolve_precision, sgd_for, trained_on

SCRIPT = """
import sys
from pathlib import Path
import torch
from helpers.train.data import load_data
from helpers.train.models import build_model
from helpers.train.training import RECIPES, fit

torch.set_num_threads(1)
model = build_model("resnet18")
history = fit(model, load_data("digits", limit=64), RECIPES["tuned"]["first"], 4, 0, Path(sys.argv[1]), precision="fp32")
torch.save(model.state_dict(), sys.argv[2])
"""


def test_a_killed_training_goes_on_to_the_result_of_an_uninterrupted_one(tmp_path):
    def start(name):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path / f"{name}.pt", tmp_path / f"{name}.weights"],
            stdout=subprocess.PIPE,
            text=True,
        )

    assert start("whole").communicate()[0].count("epoch") == 4
    killed = start("killed")
    while "epoch 2/4" not in killed.stdout.readline():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.weights").exists()
    assert "going on after epoch" in start("killed").communicate()[0]
    whole, resumed = (torch.load(tmp_path / f"{name}.weights", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_other_settings_is_not_taken_up(tmp_path, capsys):
    dataset, fewer = load_data("digits", limit=64), load_data("digits", limit=32)
    recipe, other, model = Recipe(learning_rate=0.01), Recipe(learning_rate=0.02), build_model("resnet18")
    asked = (model, dataset, recipe, 1, 0)

    def goes_on(model, *settings):
        fit(copy.deepcopy(model), *settings, tmp_path / "c.pt")
        return "going on" in capsys.readouterr().out

    for changed in (
        (build_model("resnet34"), *asked[1:]),
        (model, fewer, recipe, 1, 0),
        (model, dataset, other, 1, 0),
        (model, dataset, recipe, 2, 0),
        (model, dataset, recipe, 1, 1),
    ):
        assert not goes_on(*asked) and goes_on(*asked)
        assert not goes_on(*changed)
    (tmp_path / "c.pt").write_bytes(b"damaged")
    with pytest.raises(StudyError, match="damaged"):
        fit(build_model("resnet18"), dataset, recipe, 1, 1, tmp_path / "c.pt")


# What `fit` wrote into checkpoints before recipes had an optimizer, a warm-up and more.
KEYS_OF_BEFORE = {
    ("as_run", "further", "cifar10"): "149e4828b0e7217a295a7a9b6ccaeee30e69ac41c97e2965809d161753364c90",
    ("tuned", "first", "cifar10"): "d56c0107240a6f996ff9c581cc5b272e70dba0bffe35ff7fed11a9158a976650",
    ("tuned", "first", "digits"): "8a80ffbf6a164b76ec9b78e6e3a3d0f288b1ad39ba2d449555a712ad127716ac",
}


def test_checkpoints_from_before_a_recipe_had_more_fields_are_taken_up():
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.zeros_(model.bias)
    dataset = SimpleNamespace(name="digits", sha256="0" * 64, train=range(128))

    def key(recipe):
        return _fit_key(model, dataset, recipe, 4, 0, "fp32")

    assert {asked: key(sgd_for(*asked)) for asked in KEYS_OF_BEFORE} == KEYS_OF_BEFORE
    tuned = RECIPES["tuned"]["first"]
    assert key(replace(tuned, label_smoothing=0.1)) != key(tuned) == key(replace(tuned, label_smoothing=0.0))


TINY = {
    "optimizer": "adamw",
    "warm_up": 0.6,
    "augmentation": False,
    "label_smoothing": 0.1,
    "clip_norm": 1e-3,
}


def tiny_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(256, 10))


def test_every_part_of_a_recipe_changes_what_is_trained(tmp_path):
    dataset, plain, found = load_data("digits", limit=64), Recipe(0.01, one_cycle=True, momentum=0.9, batch_size=16), []
    for number, recipe in enumerate([plain, *(replace(plain, **{name: value}) for name, value in TINY.items())]):
        model = tiny_model()
        fit(model, dataset, recipe, 1, 0, tmp_path / f"{number}.pt", precision="fp32")
        found.append(model[2].weight.detach())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_schedule_brings_no_momentum_where_the_recipe_has_none(tmp_path):
    """`as_run_schedule` is one change; PyTorch's schedule would make two of it."""

    def in_the_second_epoch(_model, done):
        if done >= 0.5:
            raise KeyboardInterrupt

    for name, key in (("as_run_schedule", "momentum"), ("as_run_all", "betas")):
        recipe = replace(RECIPES[name]["first"], batch_size=32)
        with pytest.raises(KeyboardInterrupt):
            fit(
                tiny_model(),
                load_data("digits", limit=64),
                recipe,
                2,
                0,
                tmp_path / f"{name}.pt",
                before_step=in_the_second_epoch,
            )
        group = torch.load(tmp_path / f"{name}.pt", weights_only=True)["optimizer"]["param_groups"][0]
        assert group[key] == {"momentum": 0, "betas": (0.9, 0.999)}[key]


def test_every_step_is_announced_with_the_part_that_is_done(tmp_path):
    done = []
    recipe = Recipe(learning_rate=0.01, batch_size=32)
    fit(
        build_model("resnet18"),
        load_data("digits", limit=64),
        recipe,
        2,
        0,
        tmp_path / "c.pt",
        before_step=lambda _, at: done.append(at),
    )
    assert done == [0, 0.25, 0.5, 0.75]


def test_qat_ends_with_ranges_and_statistics_at_rest(tmp_path):
    qat = prepare_qat(fuse_for_qat(build_model("resnet18")))
    dataset, recipe = load_data("digits", limit=160), Recipe(learning_rate=0.01, batch_size=8)
    fit(qat, dataset, recipe, 1, 0, tmp_path / "c.pt", precision="fp32", before_step=freeze_near_the_end)
    before = {name: value.clone() for name, value in qat.state_dict().items()}
    qat.train()(dataset.normalise(dataset.train.images[:64]))
    assert all(torch.equal(before[name], value) for name, value in qat.state_dict().items())


def test_validation_images_move_no_range(tmp_path):
    dataset, recipe, found = load_data("digits", limit=128), Recipe(learning_rate=0.01, batch_size=64), []
    for split in (dataset.validation, Split(255 - dataset.validation.images, dataset.validation.labels)):
        torch.manual_seed(0)
        prepared = [
            prepare_qat(fuse_for_qat(build_model("resnet18"))),
            prepare_qat(fuse(build_model("resnet18")), qconfig_named(QCONFIG_NAMES[0])),
        ]
        for name, qat in enumerate(prepared):
            fit(
                qat,
                replace(dataset, validation=split),
                recipe,
                1,
                0,
                tmp_path / f"{len(found)}{name}.pt",
                precision="fp32",
            )
        found.append([value for qat in prepared for value in qat.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_divergence_is_said_not_trained_through(tmp_path):
    with pytest.raises(StudyError, match="diverged"):
        fit(
            build_model("resnet18"),
            load_data("digits", limit=128),
            Recipe(1e12),
            2,
            0,
            tmp_path / "c.pt",
            precision="fp32",
        )


def test_evaluate_counts_a_short_last_batch_once():
    dataset = load_data("digits", limit=100)
    labels = dataset.test.labels.numpy()
    seen = iter(np.split(np.eye(10, dtype=np.float32)[labels], [50]))
    result = evaluate(lambda images: next(seen), dataset, dataset.test, batch_size=64)
    assert (result.correct, result.n, result.accuracy) == (100, 100, 1.0)


def test_an_unknown_precision_ends_in_a_sentence():
    with pytest.raises(StudyError, match="precision is 'fp8'; allowed are auto, fp32, bf16"):
        resolve_precision("fp8")


def test_a_training_that_moved_names_both_machines(tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def in_the_second_epoch(_model, done):
        if done >= 0.5:
            raise Interrupted

    checkpoint = tmp_path / "checkpoints" / "01_train-x-s1.pt"
    asked = (load_data("digits", limit=64), Recipe(learning_rate=0.01, momentum=0.9), 2, 0, checkpoint)
    for machine, before_step in (("first", in_the_second_epoch), ("second", None), ("third", None)):
        monkeypatch.setattr("helpers.train.training.machine_facts", lambda machine=machine: {"gpu": machine})
        with pytest.raises(Interrupted) if before_step else nullcontext():
            fit(build_model("resnet18"), *asked, precision="fp32", before_step=before_step)
    # The third machine had no epoch left to train; the checkpoint of seed 1 is none of a run without one.
    for run_id, machines in (("01_train-x-s1", ["first", "second"]), ("01_train-x-s", None)):
        save_record(str(tmp_path), run_id, {}, None, {}, trained_on=trained_on(str(tmp_path), run_id))
        run = json.loads((tmp_path / "records" / f"{run_id}.json").read_text())["run"]
        assert run.get("trained_on") == (machines and [{"gpu": machine} for machine in machines])


def test_a_checkpoint_that_a_gpu_wrote_is_taken_up_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dataset, recipe = load_data("digits", limit=64), Recipe(learning_rate=0.01, momentum=0.9)
    with monkeypatch.context() as gpu:
        gpu.setattr(
            "torch.serialization.location_tag", lambda _: "cuda:0"
        )  # what a file says of where its tensors were
        first = fit(build_model("resnet18"), dataset, recipe, 1, 0, tmp_path / "c.pt")
    assert fit(build_model("resnet18"), dataset, recipe, 1, 0, tmp_path / "c.pt") == first
    assert "going on after epoch 1" in capsys.readouterr().out
