"""Training recipes, the one training loop and the one evaluation of the study.

Called by notebooks.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from helpers.files import StudyError, check_whole, whole_file
from helpers.machine import machine_facts
from helpers.progress import announce, progress
from helpers.train.data import Dataset, Split, augment
from helpers.train.models import Predictor, module_predictor
from helpers.train.taps import restore_dead_taps, trim_dead_taps


@dataclass(frozen=True)
class Recipe:
    """How a training runs. learning_rate: constant, or the peak of a one-cycle schedule (Smith and Topin, arXiv:1708.07120).

    momentum: of SGD; under a one-cycle schedule only that there is one, because the schedule moves it against the learning
    rate, from 0.95 to 0.85 at the peak and back (the defaults of `torch.optim.lr_scheduler.OneCycleLR`). optimizer: sgd,
    or adamw (Loshchilov and Hutter, arXiv:1711.05101) with PyTorch's betas. warm_up: the share of the steps before
    the peak of the schedule, in (0, 1). augmentation: whether images are shifted and mirrored, see `data.augment`.
    label_smoothing: the share of a label that goes to all classes, in [0, 1) (Szegedy et al., arXiv:1512.00567). clip_norm:
    the largest norm of a gradient; 0 for any. zero_init_residual: of the model that it starts from, see `models.build_model`.
    """

    learning_rate: float
    one_cycle: bool = False
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warm_up: float = 0.3
    augmentation: bool = True
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    zero_init_residual: bool = False


# Recipes once had no such fields. At their default they are left out of the key of a checkpoint, so that it stays valid.
ADDED_FIELDS = fields(Recipe)[6:]


def _phases(first: Recipe, then: float = 1) -> dict[str, Recipe]:
    """`first` trains the fp32 arm, `further` every arm that goes on from it: alike, at `then` times the rate."""
    return {"first": first, "further": replace(first, learning_rate=then * first.learning_rate)}


_AS_RUN = Recipe(learning_rate=0.1)
_ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01}  # PyTorch's defaults
# The same peak for further training, chosen on validation images of ResNet18 over 0.02.
_TUNED = Recipe(0.1, one_cycle=True, momentum=0.9, nesterov=True, weight_decay=5e-4, batch_size=128)
# `tuned` for a thousand images: more steps at a tenth of the rate, chosen on validation images so that ResNet50's loss falls
# in every epoch; at the rate for CIFAR-10 it diverges there. Further training takes fewer, larger steps: the cost of a step
# of QAT is that of its weights, whatever the batch.
_TUNED_FOR_DIGITS = replace(_TUNED, learning_rate=0.01)

# Single changes to a recipe that may help a model which trains badly.
CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "zero_init": lambda recipe: replace(recipe, zero_init_residual=True),
    "lower_rate": lambda recipe: replace(recipe, learning_rate=recipe.learning_rate / 4),
    "longer_warm_up": lambda recipe: replace(recipe, warm_up=0.5),
    "label_smoothing": lambda recipe: replace(recipe, label_smoothing=0.1),
    "no_nesterov": lambda recipe: replace(recipe, nesterov=False),
    "clipping": lambda recipe: replace(recipe, clip_norm=1.0),
}
# `tuned` and, to see what they do in a whole training, what helped ResNet50 most in short pilots (notebook 21).
TUNED = {"tuned": (), "tuned_lower_rate": ("lower_rate",), "tuned_zero_init": ("zero_init",)}


def changed(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """`recipe` with some of CHANGES."""
    for change in changes:
        recipe = CHANGES[change](recipe)
    return recipe


# `documented` is what the reference study says, `as_run` what its code does, `as_run_*` that with one change or with all,
# `tuned` ours, `tuned_*` that with one change.
RECIPES: dict[str, dict[str, Recipe]] = {
    "documented": _phases(Recipe(learning_rate=1e-3)),
    "as_run": _phases(_AS_RUN, 1 / 100),
    "as_run_unaugmented": _phases(replace(_AS_RUN, augmentation=False), 1 / 100),
    "as_run_schedule": _phases(replace(_AS_RUN, one_cycle=True), 1 / 100),
    "as_run_adamw": _phases(replace(_AS_RUN, **_ADAMW), 1 / 100),
    "as_run_all": _phases(replace(_AS_RUN, one_cycle=True, **_ADAMW), 1 / 100),
} | {name: _phases(changed(_TUNED, changes)) for name, changes in TUNED.items()}
FOR_DIGITS: dict[str, dict[str, Recipe]] = {
    name: {
        "first": changed(replace(_TUNED_FOR_DIGITS, batch_size=64), changes),
        "further": changed(_TUNED_FOR_DIGITS, changes),
    }
    for name, changes in TUNED.items()
}

PRECISIONS = ("auto", "fp32", "bf16")


def sgd_for(recipe: str, phase: str, data: str) -> Recipe:
    """How a recipe trains in its `first` or its `further` phase, on a data set (data.DATA_NAMES)."""
    return (RECIPES | FOR_DIGITS if data == "digits" else RECIPES)[recipe][phase]


@dataclass(frozen=True)
class Evaluation:
    """Top-1 result on one split. predictions: uint8 [n], the predicted classes. accuracy: correct / n, in [0, 1]."""

    predictions: np.ndarray
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """Fraction of images classified correctly."""
        return self.correct / self.n


def evaluate(predictor: Predictor, dataset: Dataset, split: Split, batch_size: int = 250) -> Evaluation:
    """Score a predictor (any runtime, see `runtimes.load_predictor`) on every image of `split`.

    batch_size: at most; batches are of equal size where that is possible, because some runtimes compile for each size.
    """
    predictions = []
    batch_size = math.ceil(len(split) / math.ceil(len(split) / batch_size))
    for start in range(0, len(split), batch_size):
        images = dataset.normalise(split.images[start : start + batch_size])
        predictions.append(predictor(images.cpu().numpy()).argmax(axis=1).astype(np.uint8))
    classes = np.concatenate(predictions)
    correct = int((classes == split.labels.cpu().numpy()).sum())
    return Evaluation(classes, correct, len(split))


def resolve_precision(precision: str) -> str:
    """Turn `auto` into `bf16` where the GPU or the CPU multiplies bfloat16 in hardware, else into `fp32`.

    Raises StudyError for a word that is not in PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise StudyError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & {*machine_facts()["isa"]} else "fp32"


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    epochs: int,
    seed: int,
    checkpoint: Path,
    label: str = "",
    precision: str = "auto",
    before_step: Callable[[nn.Module, float], None] | None = None,
    live_taps_only: bool = False,
) -> list[dict[str, float]]:
    """Train `model` in place on `dataset.train` and return one row an epoch; the same call resumes after an interruption.

    epochs: passes over the training images, >= 0. seed: decides the order and the augmentation of every epoch, so an
    interrupted run ends like an uninterrupted one on the same CPU (a GPU may round differently each time). checkpoint: written after each epoch; it is taken
    up again only if recipe, epochs, seed, data, precision and initial weights are the same, also on another machine: one
    may train and another go on, see `trained_on`. The caller deletes it once the result is safe. before_step(model, done):
    called before every step, `done` the finished part of the training in [0, 1); a change that it makes at some point must
    hold from there on, because a resumed training starts at an epoch. live_taps_only: of a float model, leave out the taps
    that see only padding (taps.trim_dead_taps); they get no gradient, so the outputs are the same, and they keep the values
    that they had.
    Rows have epoch (from 1), lr (at the end of the epoch), train_loss, val_accuracy in [0, 1], seconds (of training
    and `before_step`, validation left out) and images_per_second. Raises StudyError when the loss or a weight is no longer finite.
    """
    precision = resolve_precision(precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = model
    if live_taps_only:
        model = trim_dead_taps(whole, dataset.train.images.shape[-1])
    key = _fit_key(model, dataset, recipe, epochs, seed, precision)
    model.to(device, memory_format=torch.channels_last)
    split = Split(dataset.train.images.to(device), dataset.train.labels.to(device))
    steps = max(1, len(split) // recipe.batch_size)
    optimizer = _optimizer(model, recipe)
    scheduler = None
    if recipe.one_cycle and epochs:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            recipe.learning_rate,
            total_steps=steps * epochs,
            pct_start=recipe.warm_up,
            cycle_momentum=recipe.momentum > 0,
        )
    parts = {"model": model, "optimizer": optimizer, **({"scheduler": scheduler} if scheduler else {})}
    history, machines = _resume(checkpoint, key, parts, epochs)
    if len(history) < epochs:
        if (here := machine_facts()) not in machines:
            machines.append(here)
        print(f"{label}: {epochs - len(history)} passes of {steps} steps, a line after each", flush=True)

    for epoch in range(len(history), epochs):
        started = time.perf_counter()
        batches = _batches(dataset, split, recipe, steps, seed, epoch)
        batches = progress(batches, f"{label} epoch {epoch + 1}", steps)

        def before(step: int, epoch: int = epoch) -> None:
            if before_step is not None:
                before_step(model, (epoch + step / steps) / epochs)

        loss = _train_epoch(model, batches, recipe, optimizer, scheduler, precision, before)
        _check_finite(model, loss, f"{label}: the training diverged in epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        with _buffers_kept(model):  # observers record in evaluation, too, but ranges come from training images only
            validation = evaluate(module_predictor(model), dataset, dataset.validation)
        history.append(
            {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": loss,
                "val_accuracy": validation.accuracy,
                "seconds": seconds,
                "images_per_second": steps * min(recipe.batch_size, len(split)) / seconds,
            }
        )
        needed = parts if epoch + 1 < epochs else {"model": model}  # nothing goes on after the last epoch
        states = {name: part.state_dict() for name, part in needed.items()}
        with whole_file(checkpoint) as aside:
            torch.save({"key": key, "history": history, "machines": machines} | states, aside)
        left = (epochs - epoch - 1) * sum(row["seconds"] for row in history) / len(history)
        left_text = f"about {left / 60:.0f} min left" if left >= 60 else "under a minute left" if left else "done"
        announce(
            f"{label} epoch {epoch + 1}/{epochs}: loss {loss:.3f}, validation {validation.accuracy:.1%}, {seconds:.0f} s "
            f"({history[-1]['images_per_second']:.0f} images/s), {left_text}"
        )
    model.to("cpu", memory_format=torch.contiguous_format).eval()
    if live_taps_only:
        restore_dead_taps(whole.eval(), model)
    return history


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give all buffers of `model` (ranges, statistics) the values back that they have now."""
    buffers = [
        (owner, name, value.clone()) for owner in model.modules() for name, value in owner.named_buffers(recurse=False)
    ]
    yield
    for owner, name, value in buffers:
        setattr(owner, name, value)


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), rate, recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov)


def _batches(
    dataset: Dataset, split: Split, recipe: Recipe, steps: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, normalised, and augmented if the recipe says so, and labels of one pass over `split`; the last incomplete batch is left out."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(split), generator=generator).to(split.images.device)
    for chosen in order.split(recipe.batch_size)[:steps]:
        images = split.images[chosen]
        if recipe.augmentation:
            images = augment(images, generator, dataset.flip)
        yield dataset.normalise(images).contiguous(memory_format=torch.channels_last), split.labels[chosen]


def _train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    precision: str,
    before_step: Callable[[int], None],
) -> float:
    """One pass over `batches`; before_step is told the number of each, from 0. Returns the mean loss."""
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    total, steps = 0.0, 0
    for images, labels in batches:
        before_step(steps)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total, steps = total + loss.detach(), steps + 1
    return float(total) / steps


def _check_finite(model: nn.Module, loss: float, complaint: str) -> None:
    """Raise StudyError, beginning with `complaint`, when the loss or a learned tensor is no longer finite.

    The last step can spoil weights, or batch norm's running statistics, after a loss that was still a number. Ranges of
    observers are left out: infinite means not seen yet.
    """
    learned = [tensor for name, tensor in model.state_dict().items() if name.split(".")[-1] in _LEARNED]
    spoilt = sum(not tensor.isfinite().all() for tensor in learned)
    if spoilt or not np.isfinite(loss):
        raise StudyError(
            f"{complaint} (loss {loss:.3g}, {spoilt} of {len(learned)} tensors are not finite); take another recipe ({', '.join(RECIPES)}) or lower its rate in RECIPES."
        )


_LEARNED = ("weight", "bias", "running_mean", "running_var")


def _fit_key(model: nn.Module, dataset: Dataset, recipe: Recipe, epochs: int, seed: int, precision: str) -> str:
    """A digest of all that decides the outcome of `fit`."""
    defaults = {field.name: field.default for field in ADDED_FIELDS}
    facts = [
        {name: value for name, value in asdict(recipe).items() if name not in defaults or value != defaults[name]},
        epochs,
        seed,
        precision,
        dataset.name,
        dataset.sha256,
        len(dataset.train),
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().clone().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def trained_on(run_dir: str, run_id: str) -> list[dict[str, Any]]:
    """The machines, as `machine.machine_facts`, on which `fit` trained the checkpoints of a run; each once.

    They lie in `run_dir`/checkpoints as `run_id`.pt or `run_id`-*.pt.
    """
    folder = Path(run_dir) / "checkpoints"
    paths = sorted([*folder.glob(f"{run_id}.pt"), *folder.glob(f"{run_id}-*.pt")])
    found = [facts for path in paths for facts in _stored(path)["machines"]]
    return [facts for number, facts in enumerate(found) if facts not in found[:number]]


def _resume(
    checkpoint: Path, key: str, parts: dict[str, Any], epochs: int
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Load the checkpoint into `parts` if it is whole and belongs to this call.

    Returns the rows of the finished epochs, and the machines that trained them.
    """
    stored = _stored(checkpoint) if checkpoint.exists() else {"key": ""}
    if stored["key"] != key:
        return [], []
    finished = len(stored["history"])
    for name in parts if finished < epochs else ("model",):
        parts[name].load_state_dict(stored[name])
    print(f"going on after epoch {finished} of {checkpoint.name}", flush=True)
    return stored["history"], stored["machines"]


def _stored(checkpoint: Path) -> dict[str, Any]:
    """What `fit` wrote. Raises StudyError when it cannot be read, or is of an earlier version of the study."""
    try:
        check_whole(checkpoint)
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)  # a GPU may have written it
        return {name: stored[name] for name in ("key", "history", "machines")} | stored
    except Exception as error:  # whatever the damaged file makes the reader raise
        raise StudyError(
            f"{checkpoint} is damaged ({type(error).__name__}); delete it to train from the start."
        ) from error
