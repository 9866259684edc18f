"""The study as a pipeline: one table of its notebooks, the profiles that say which models go through them, and `ensure`.

Snakefile, book, README's list and every notebook that needs another one read NOTEBOOKS.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from helpers.files import StudyError, refused
from helpers.quantize.arms import LEGACY
from helpers.report.records import gather, read_record, runs_of
from helpers.report.schema import run_name
from helpers.study.parameters import Arch, RecipeName, Seed, checked, no_others, validated
from helpers.train.data import TRAINING_IMAGES

if TYPE_CHECKING:
    import nbformat

Models = Literal["trained", "served", "timed", "first", "none"]


@dataclass(frozen=True)
class Notebook:
    """What the pipeline must know of a notebook.

    models: it runs once for each model that is trained, served (exported) or timed, for the first model only, or once for
    none of them. minutes: of ResNet18 on the digits on two cores; only ratios matter, for the time that is left. needs: whose
    results of the same model it takes. trains: it gets a share of the cores, and a GPU. alone: it compares latencies, so it
    waits until nothing else is left to do and has every core. clocks: it times exports and first calls on its way, for which
    it gets every core, too, unless the profile does without them (`first_calls: false`). experiment: one question beyond the
    walk-through, left out by profiles that say so. reads: it reads the records of all others and makes none.
    eager_int8: it is about eager-mode INT8, so it is left out where PyTorch has none. float_exports: suffixes of the float
    models that it writes; `make study` removes them when all is done, because they are made again in seconds.
    """

    models: Models
    minutes: float
    needs: tuple[str, ...] = ()
    trains: bool = False
    alone: bool = False
    clocks: bool = False
    experiment: bool = False
    reads: bool = False
    eager_int8: bool = False
    float_exports: tuple[str, ...] = ()


NOTEBOOKS: dict[str, Notebook] = {
    "01_train": Notebook("trained", 0.7, trains=True),
    "02_ptq": Notebook("trained", 0.3, needs=("01_train",), eager_int8=True),
    "03_qat": Notebook("trained", 0.5, needs=("01_train",), trains=True, eager_int8=True),
    "04_jit": Notebook("served", 0.4, ("02_ptq", "03_qat"), clocks=True, eager_int8=True, float_exports=(".pt",)),
    "05_onnx_openvino": Notebook(
        "served", 0.5, ("01_train", "02_ptq", "03_qat"), clocks=True, float_exports=(".onnx", ".xml")
    ),
    "06_benchmark": Notebook("timed", 0.8, ("04_jit", "05_onnx_openvino"), alone=True),
    "07_analysis": Notebook("none", 0.3, reads=True),
    "08_carry_over": Notebook("none", 3, alone=True, experiment=True),
    "09_ptq_collapse": Notebook("none", 5, trains=True, experiment=True, eager_int8=True),
    "10_your_model": Notebook("none", 3, alone=True, experiment=True),
    "11_dead_taps": Notebook(
        "timed", 0.7, ("04_jit", "05_onnx_openvino"), clocks=True, experiment=True, eager_int8=True
    ),
    "12_runtimes": Notebook("timed", 4, ("05_onnx_openvino",), trains=True, clocks=True, experiment=True),
    "13_where_time_goes": Notebook(
        "timed", 3, ("04_jit", "05_onnx_openvino"), alone=True, experiment=True, eager_int8=True
    ),
    "14_calibration": Notebook("timed", 2, ("01_train",), experiment=True, eager_int8=True),
    "15_bit_widths": Notebook("first", 4, ("03_qat",), trains=True, experiment=True, eager_int8=True),
    "16_what_accuracy_hides": Notebook("first", 1, ("04_jit", "05_onnx_openvino"), experiment=True, eager_int8=True),
    "17_load": Notebook("none", 5, alone=True, experiment=True),
    "18_this_machine": Notebook("none", 3, alone=True, experiment=True),
    "19_settings": Notebook("timed", 8, ("01_train",), alone=True, experiment=True),
    "20_recipes": Notebook("none", 8, ("03_qat",), trains=True, experiment=True, eager_int8=True),
    "21_healthy_resnet50": Notebook("none", 10, trains=True, experiment=True, eager_int8=True),
}
LEFT_OUT = tuple(name for name, notebook in NOTEBOOKS.items() if notebook.eager_int8 and not LEGACY)
# A process started so ends with the one that started it, even if that is killed (Linux).
WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
READERS = tuple(name for name, notebook in NOTEBOOKS.items() if notebook.reads)
# A profile may leave these out for some of its models: they belong to a model, and no other notebook needs their results.
OPTIONAL = tuple(n for n, notebook in NOTEBOOKS.items() if notebook.experiment and notebook.models != "none")
# How much longer than ResNet18's all that is done to a model takes.
SIZE_OF = {"resnet18": 1.0, "resnet18_cifar": 5.0, "resnet34": 1.3, "resnet50": 2.0}
# What a profile says with its models and its name, and nowhere else.
OF_THE_MODEL = ("arch", "recipe", "seed", "run_dir")
# Which images and which weights: the same for all that is done to a model, so a profile says it under `common`.
OF_THE_STUDY = ("data", "data_dir", "limit", "start_from")


class Block(BaseModel):
    """Models to train: every combination of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    archs: Annotated[list[Arch], Field(min_length=1)]
    recipes: Annotated[list[RecipeName], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    notebooks: dict[str, dict[str, Any]] = {}  # parameters of notebooks for these models only
    leave_out: list[Literal[*OPTIONAL]] = []  # notebooks that these models do without

    def models(self) -> list[dict[str, Any]]:
        """Its models as arch, recipe and seed."""
        found = product(self.archs, self.recipes, self.seeds)
        return [dict(zip(("arch", "recipe", "seed"), model, strict=True)) for model in found]


class Profile(BaseModel):
    """A profile file: which models to run, and the parameters of the notebooks, all of them declared there."""

    model_config = ConfigDict(strict=True, extra="forbid")

    models: Annotated[list[Block], Field(min_length=1)]
    experiments: bool = True  # also the notebooks from 8 on
    common: dict[str, Any] = {}
    notebooks: dict[str, dict[str, Any]] = {}

    def trained(self) -> list[dict[str, Any]]:
        """The models of all blocks, each once, as arch, recipe and seed; the first one gives the book its chapters."""
        found = [model for block in self.models for model in block.models()]
        return [model for number, model in enumerate(found) if model not in found[:number]]

    def served(self) -> list[dict[str, Any]]:
        """The models that are exported: all that were trained with the first one's recipe."""
        return [model for model in self.trained() if model["recipe"] == self.trained()[0]["recipe"]]

    def timed(self) -> list[dict[str, Any]]:
        """The models that the benchmark times: of each arch the first one, because latency does not depend on weights."""
        return list({model["arch"]: model for model in reversed(self.served())}.values())[::-1]

    def runs(self, notebook: str, model: Mapping[str, Any] | None = None) -> bool:
        """Whether the profile has `notebook` at all, and whether this model goes through it: its first block says so."""
        blocks = [block for block in self.models if model in block.models()][:1]
        left_out = notebook in LEFT_OUT or (NOTEBOOKS[notebook].experiment and not self.experiments)
        return not left_out and not any(notebook in block.leave_out for block in blocks)

    def planned(self, notebook: str) -> list[dict[str, Any]]:
        """The models that `notebook` runs for; [{}] for a notebook that runs once for all."""
        if NOTEBOOKS[notebook].models == "none":
            return [{}] if self.runs(notebook) else []
        chosen = {
            "trained": self.trained(),
            "served": self.served(),
            "timed": self.timed(),
            "first": self.trained()[:1],
        }
        return [model for model in chosen[NOTEBOOKS[notebook].models] if self.runs(notebook, model)]

    def run_id(self, notebook: str) -> str:
        """The run of a notebook that the book shows: of those that handle one model, its first model's.

        Of the others 9 names the seed of its trainings, and 10 and 20 the study's ResNet18, where nobody asks for another model.
        """
        first, declared = self.trained()[0], declared_parameters(notebook)
        chosen = {key: first[key] for key in first if key in declared} if "arch" in declared else {}
        if notebook == "09_ptq_collapse":
            chosen = {"seed": first["seed"]}
        if notebook in ("10_your_model", "20_recipes"):
            chosen = {"arch": "resnet18"}
        return run_name(notebook, **chosen)

    def arguments(self, notebook: str, name: str, **chosen: Any) -> dict[str, Any]:
        """The papermill parameters of one run of `notebook` under the profile called `name`; `chosen` wins."""
        declared = declared_parameters(notebook)
        own = [block.notebooks.get(notebook, {}) for block in self.models if chosen in block.models()][:1]
        values = {**self.common, **self.notebooks.get(notebook, {}), **(own[0] if own else {})}
        values |= {"run_dir": f"runs/{name}", **chosen}
        return {key: value for key, value in values.items() if key in declared}


def load_profile(name: str, folder: Path = Path("profiles")) -> Profile:
    """Read and check profiles/`name`.yml. Raises StudyError, naming file and key, for anything that no notebook would take."""
    path = folder / f"{name}.yml"
    if name not in (there := sorted(p.stem for p in folder.glob("*.yml"))):
        raise StudyError(f"profile is {name!r}; allowed are {', '.join(there)}.")
    try:
        content = yaml.safe_load(path.read_text())
    except Exception as error:  # what a value looks like, but cannot be, has exceptions of its own
        raise StudyError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    profile = validated(Profile, content, f"{path}: ")
    assert isinstance(profile, Profile)
    declared = {notebook: declared_parameters(notebook) for notebook in NOTEBOOKS}
    settable = {notebook: [key for key in keys if key not in OF_THE_MODEL] for notebook, keys in declared.items()}
    of_models = [notebook for notebook in NOTEBOOKS if "arch" in declared[notebook]]
    no_others(list(profile.common), sorted({key for keys in settable.values() for key in keys}), f"{path}: common")
    checked(profile.common, f"{path}: common.")
    for notebooks, allowed in (
        (profile.notebooks, NOTEBOOKS),
        *((block.notebooks, of_models) for block in profile.models),
    ):
        no_others(list(notebooks), list(allowed), f"{path}, which names notebooks here")
        for notebook, values in notebooks.items():
            for key in values.keys() & OF_THE_STUDY if notebook in of_models else ():
                raise StudyError(f"{path}: {notebook}.{key} is the same in all notebooks; give it under common.")
            no_others(list(values), settable[notebook], f"{path}: {notebook}")
            checked(values, f"{path}: {notebook}.")
    return profile


def declared_parameters(notebook: str, folder: Path = Path("notebooks")) -> list[str]:
    """Names in the parameters cell of a notebook. Raises StudyError when it has no such cell."""
    for cell in read_notebook(folder / f"{notebook}.ipynb").cells:
        if "parameters" in cell.metadata.get("tags", []):
            return [line.split(":")[0] for line in cell.source.splitlines() if ":" in line.split("#")[0]]
    raise StudyError(f"{notebook} has no cell tagged parameters.")


def read_notebook(path: Path) -> "nbformat.NotebookNode":
    """Read a notebook. Raises StudyError when it is damaged."""
    import nbformat

    with refused(f"{path} is no whole notebook; restore it, or run it again"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)  # of what is wrong, reading only warns
    return notebook


def ensure(record: Path | str, notebook: str, parameters: Mapping[str, Any], **chosen: Any) -> None:
    """Run `notebook` if its `record` is missing or stale, with those of `parameters` that it declares: any notebook runs alone.

    A record is stale when a record that it was made from was made again afterwards, or when files that `make study` removed
    at its end are gone. chosen: parameters that win over
    `parameters`. The executed notebook is kept beside the record's folder. Raises StudyError when the record was made with
    other values of parameters that both notebooks have: other images, or another quantization.
    """
    record = Path(record)
    asked = {**parameters, **chosen}
    why = f"{record} is missing"
    if record.exists():
        run = read_record(record)["run"]
        _no_other_values(record, run["parameters"], asked)
        sources = [record.with_name(f"{name}.json") for name in made_from(record.stem, notebook)]
        newer = [source for source in sources if source.exists() and _date(source) > run["date"]]
        gone = [file for file in float_exports(record, notebook) if not file.exists()]
        if not newer and not gone:
            return
        why = f"{record} is older than {newer[0].name}, from which it was made" if newer else f"{gone[0]} is missing"
        asked = run["parameters"] | asked  # made again as it was
    import papermill

    print(f"{why}; {notebook} makes it: running it now with the same settings.", flush=True)
    values = {key: value for key, value in asked.items() if key in declared_parameters(notebook)}
    executed = record.parent.parent / "notebooks" / f"{record.stem}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    source = Path("notebooks") / f"{notebook}.ipynb"
    papermill.execute_notebook(source, executed, values, progress_bar=False, stdout_file=sys.stdout, cwd=os.getcwd())


def made_from(run_id: str, notebook: str) -> Iterator[str]:
    """The names of the runs of the same model that a run of `notebook` takes results from, directly or not."""
    for other in NOTEBOOKS[notebook].needs if notebook in NOTEBOOKS else ():  # results may be older than the notebooks
        source = run_id.replace(notebook, other, 1)
        yield source
        yield from made_from(source, other)


def float_exports(record: Path, notebook: str) -> list[Path]:
    """The files of the float model that a run of `notebook` writes beside its record, see `Notebook`."""
    model = record.stem.removeprefix(notebook).lstrip("-")
    folder = record.parent.parent / "weights"
    return [folder / f"{model}-fp32{suffix}" for suffix in NOTEBOOKS[notebook].float_exports]


def _date(record: Path) -> str:
    return read_record(record)["run"]["date"]


def _no_other_values(record: Path, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise StudyError if a record was made with other values than are asked for.

    Free are places, the engine, which is chosen anew whenever INT8 weights are loaded, and a precision that is asked for as
    `auto`: the machine that made the record had its own; and which rows there are. Records keep no more calibration images
    than there are.
    """
    asked = dict(asked)
    if asked.get("precision") == "auto":
        del asked["precision"]
    if "calibration_images" in asked and "data" in made:
        there = TRAINING_IMAGES[made["data"]]
        asked["calibration_images"] = min(asked["calibration_images"], asked.get("limit") or there, there)
    for name in sorted(
        (made.keys() & asked.keys()) - {"run_dir", "data_dir", "engine", "arms", "as_reference", "first_calls"}
    ):
        if made[name] != asked[name]:
            raise StudyError(
                f"{name} is {asked[name]!r}, but {record} was made with {made[name]!r}; give that value or another run_dir, "
                f"or remove {record.parent.parent}."
            )


def results_of(run_dir: str, parameters: Mapping[str, Any]) -> Path:
    """The folder with the results of a run, gathered from its records; ResNet18 is timed now if nothing of it is there yet.

    parameters: of the notebook that asks, for notebook 6. A published book, which has results only, is left as it is.
    """
    results, records = Path(run_dir) / "book" / "results", Path(run_dir) / "records"
    if not records.exists() and not (results / "runs.json").exists():
        record = records / f"{run_name('06_benchmark', 'resnet18', 'tuned', 0)}.json"
        ensure(record, "06_benchmark", parameters, arch="resnet18")
    if records.exists():
        collect(run_dir, results)
    return results


def collect(run_dir: str, results: Path, keep: bool = False) -> None:
    """Gather the records of a run (`records.gather`). Raises StudyError when one is older than what it was made from."""
    none_outdated(runs_of(run_dir, results if keep else None))
    gather(run_dir, results, keep)


def none_outdated(runs: Mapping[str, Any]) -> None:
    """Raise StudyError if a run is older than one of the same model that it was made from: their rows do not belong together."""
    for run_id, run in sorted(runs.items()):
        for source in made_from(run_id, run["notebook"]):
            if source in runs and runs[source]["date"] > run["date"]:
                raise StudyError(
                    f"{run_id} is older than {source}, from which it was made; run {run['notebook']} again."
                )
