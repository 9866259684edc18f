"""Trained models that come with the study, so that nobody has to train: kernel taps that see pixels only, in float16.

Command line: python -m helpers.train.published RUN_DIR [ARCH RECIPE SEED] adds the model of a finished run.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.files import StudyError
from helpers.report.records import read_record
from helpers.report.schema import run_name
from helpers.train.data import load_data
from helpers.train.models import IMAGE_SIZE, ResNet, build_model, module_predictor
from helpers.train.taps import restore_dead_taps, trim_dead_taps
from helpers.train.training import Evaluation, evaluate
from helpers.train.weights import load_state, load_weights, save_weights, weights_path

FOLDER = Path("book/weights")
LARGEST_CHANGE = 2**-10  # of a tensor by rounding, as a share of its norm: twice what 11 bits of precision can do
FORM = "published"


def published_path(arch: str, recipe: str, seed: int) -> Path:
    """Where the published weights of a model lie."""
    return FOLDER / f"{arch}-{recipe}-s{seed}.safetensors"


def pack(model: ResNet) -> dict[str, Tensor]:
    """The state of a float model as it is published: kernels and matrices in float16, dead taps (`taps`) left out, the rest as it is.

    Raises StudyError, naming the tensor, for values that float16 cannot hold: too large, not finite, or so small that they vanish.
    """
    state = trim_dead_taps(model, IMAGE_SIZE).state_dict()
    return {name: _halved(name, tensor) if tensor.ndim > 1 else tensor for name, tensor in state.items()}


def _halved(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        raise StudyError(
            f"{name} reaches {tensor.abs().max():.3g}; float16 ends at 65504, so this model cannot be published."
        )
    change = float((half.float() - tensor).norm() / tensor.norm())
    if change > LARGEST_CHANGE:
        raise StudyError(
            f"{name} has values too small for float16 (rounding changes it by {change:.1%}, {LARGEST_CHANGE:.1%} is "
            "allowed), so this model cannot be published."
        )
    return half


def expand(packed: dict[str, Tensor], arch: str, seed: int, path: Path) -> ResNet:
    """The float model that `pack` made `packed` of, exact but for the rounding to float16; in eval mode.

    Dead taps get the initial values of `seed`, which training leaves as they are. path: named in the StudyError when names or
    shapes differ.
    """
    model = build_model(arch, seed).eval()
    trimmed = trim_dead_taps(model, IMAGE_SIZE)
    load_state(trimmed, {name: t.float() if t.is_floating_point() else t for name, t in packed.items()}, path)
    restore_dead_taps(model, trimmed)
    return model


def publish(run_dir: str, arch: str, recipe: str, seed: int, path: Path | None = None) -> tuple[Path, Evaluation]:
    """Write the model that notebook 1 trained in `run_dir` to `path` (default: `published_path`) with how it came to be.

    Returns the path and the test accuracy *as stored*, which the file says, too. Raises StudyError when the run has no such
    model, when its images are not at hand, and when float16 cannot hold it.
    """
    path = path or published_path(arch, recipe, seed)
    record = Path(run_dir) / "records" / f"{run_name('01_train', arch, recipe, seed)}.json"
    if not record.exists():
        raise StudyError(f"{record} is missing; run notebook 1 with this run_dir first.")
    run = read_record(record)["run"]
    source = weights_path(run_dir, arch, recipe, seed, "fp32")
    model = build_model(arch, seed).eval()
    load_state(model, load_weights(source, arch)[0], source)
    packed = pack(model)
    asked = run["parameters"]
    dataset = load_data(asked["data"], asked["data_dir"], limit=asked["limit"])
    if dataset.sha256 != run["data"]["sha256"]:
        raise StudyError(
            f"{source} was trained on {run['data']['name']} with the SHA-256 {run['data']['sha256'][:12]}, here it is "
            f"{dataset.sha256[:12]}; set CIFAR10_ROOT to the images of the training."
        )
    found = evaluate(module_predictor(expand(packed, arch, seed, path)), dataset, dataset.test)
    facts = {"arch": arch, "recipe": recipe, "seed": seed, "form": FORM, "epochs": asked["epochs"]}
    facts |= {"data": asked["data"], "images": dataset.name, "images_sha256": dataset.sha256, "commit": run["commit"]}
    facts |= {"date": run["date"], "correct": found.correct, "n": found.n, "accuracy": found.accuracy}
    save_weights(path, packed, {name: str(value) for name, value in facts.items()})
    return path, found


def load_published(start_from: str, arch: str, recipe: str, seed: int, data: str) -> tuple[ResNet, dict[str, Any]]:
    """The published model (eval mode), and what its record should say: the file, its SHA-256, and what `publish` wrote into it.

    start_from: "published", or the path of a file that `publish` wrote. data: one of data.DATA_NAMES. Raises StudyError when
    there is no such file, or when it is of another arch, recipe, seed or data set.
    """
    path = check_start(start_from, arch, recipe, seed, data)
    assert path is not None
    state, facts = load_weights(path)
    facts |= {"file": path.name, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return expand(state, arch, seed, path), facts | {"epochs": int(facts["epochs"])}


def check_start(start_from: str, arch: str, recipe: str, seed: int, data: str) -> Path | None:
    """The file that a training is started from, None for random weights. Raises StudyError as `load_published` does."""
    if start_from == "random":
        return None
    path = published_path(arch, recipe, seed) if start_from == "published" else Path(start_from)
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none yet"
        raise StudyError(
            f"start_from is {start_from!r}, but {path} is missing; {path.parent} has {there}. Take another model, or "
            "start_from: random, which trains."
        )
    facts = load_weights(path)[1]
    if facts.get("form") != FORM:
        raise StudyError(f"{path} is not a published model; python -m helpers.train.published makes one of a run.")
    for name, asked in {"arch": arch, "recipe": recipe, "seed": str(seed), "data": data}.items():
        if facts[name] != asked:
            raise StudyError(
                f"{path} holds a model with {name} {facts[name]}, but {name} is {asked}; give {facts[name]}, or "
                "start_from: random, which trains."
            )
    return path


def _command(arguments: list[str]) -> None:
    match arguments:
        case [run_dir]:
            arch, recipe, seed = "resnet18", "tuned", "0"
        case [run_dir, arch, recipe, seed] if seed.isdecimal():
            pass
        case other:
            raise StudyError(f"{other} is given; RUN_DIR is needed, or RUN_DIR ARCH RECIPE SEED.")
    path, found = publish(run_dir, arch, recipe, int(seed))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; as stored {found.correct} of {found.n} test images are right")


if __name__ == "__main__":
    try:
        _command(sys.argv[1:])
    except StudyError as error:
        sys.exit(f"published: {error}")
