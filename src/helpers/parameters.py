"""Parameters of notebooks and profiles: what is allowed, said once, and checked before any work starts.

papermill only warns about a misspelt parameter and turns `-p epochs ten` into a string. So every notebook calls
`check_parameters` in the cell after its parameters, and `make study` reads a profile through `load_profile`. The lists of
allowed words stand in the modules that they belong to.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from helpers.data import DATA_NAMES, TRAINING_IMAGES
from helpers.files import StudyError, check_writable
from helpers.models import ARCHS
from helpers.quantization import ENGINES, LEGACY, NO_LEGACY, QCONFIG_NAMES
from helpers.training import PRECISIONS, RECIPES

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


def _all_or_several(limit: int) -> int:
    if limit == 1:
        raise PydanticCustomError("limit", "use 0 for all images, or at least 2: batch norm needs two to train")
    return limit


Arch = Literal[*ARCHS]
RecipeName = Literal[*RECIPES]

# Every parameter that a notebook may declare: one name, one meaning, one range.
PARAMETERS: dict[str, Any] = {
    "arch": Arch,
    "recipe": RecipeName,
    "seed": Count,
    "data": Literal[*DATA_NAMES],
    "data_dir": str,
    "limit": Annotated[int, Field(ge=0), AfterValidator(_all_or_several)],
    "run_dir": Annotated[str, Field(min_length=1)],
    "epochs": Count,
    "extra_epochs": Count,
    "precision": Literal[*PRECISIONS],
    "qconfig": Literal[*QCONFIG_NAMES],
    "engine": Literal[*ENGINES] if LEGACY else str,  # without any, what needs one says so
    "calibration_images": Positive,
    "calibration_sizes": Annotated[list[Positive], Field(min_length=1)],
    "draws": Positive,
    "rounds": Positive,
    "threads": Annotated[list[Positive], Field(min_length=1)],
    "batches": Annotated[list[Positive], Field(min_length=1)],
    "app_seconds": Positive,
    "probed_images": Positive,
    "control_images": Positive,
    "archs": Annotated[list[Arch], Field(min_length=1)],
}
# No other notebook needs the results of these, so a profile may leave them out where they take too long.
OPTIONAL = (
    "11_dead_taps",
    "12_runtimes",
    "13_where_time_goes",
    "14_calibration",
    "15_bit_widths",
    "16_what_accuracy_hides",
)
NOTEBOOKS = (
    "01_train",
    "02_ptq",
    "03_qat",
    "04_jit",
    "05_onnx_openvino",
    "06_benchmark",
    "07_analysis",
    "08_qat_or_longer",
    "09_ptq_collapse",
    "10_jpeg_copy",
    *OPTIONAL,
    "17_decide",
)
# Whose results a notebook takes, of the same model; notebook 9 trains models of its own, and the readers take what there is.
NEEDS: dict[str, list[str]] = {
    "01_train": [],
    "02_ptq": ["01_train"],
    "03_qat": ["01_train"],
    "04_jit": ["02_ptq", "03_qat"],
    "05_onnx_openvino": ["01_train", "02_ptq", "03_qat"],
    "06_benchmark": ["04_jit", "05_onnx_openvino"],
    "10_jpeg_copy": ["02_ptq"],
    "11_dead_taps": ["04_jit", "05_onnx_openvino"],
    "12_runtimes": ["05_onnx_openvino"],
    "13_where_time_goes": ["04_jit", "05_onnx_openvino"],
    "14_calibration": ["01_train"],
    "15_bit_widths": ["03_qat"],
    "16_what_accuracy_hides": ["04_jit", "05_onnx_openvino"],
}
# What a profile says with its models and its name, and nowhere else.
OF_THE_MODEL = ("arch", "recipe", "seed", "archs", "run_dir")
# Which images: the same for all that is done to a model, so a profile says it under `common`.
OF_THE_STUDY = ("data", "data_dir", "limit")
# These read the records of all others, and train or time nothing.
READERS = ("07_analysis", "08_qat_or_longer", "17_decide")
# These are about eager-mode INT8, and left out where PyTorch has none; the others run with the rows that exist.
ABOUT_EAGER_INT8 = (
    *("02_ptq", "03_qat", "04_jit", "08_qat_or_longer", "09_ptq_collapse", "10_jpeg_copy", "11_dead_taps"),
    *("13_where_time_goes", "14_calibration", "15_bit_widths", "16_what_accuracy_hides"),
)
LEFT_OUT = () if LEGACY else ABOUT_EAGER_INT8


def check_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Check the parameters of the running notebook and return them by name.

    namespace: the notebook's `globals()`. What its cells (`In`) annotate are the declared parameters; what papermill injected
    must be among them. Raises StudyError when no cell that ran declares any, for an unknown name, a wrong type, a value that is
    not allowed, a run_dir that cannot be written, or an INT8 engine where PyTorch has none.
    """
    cells = namespace.get("In", [])
    declared = list(dict.fromkeys(name for cell in cells for name in re.findall(r"^(\w+): \w+ = ", cell, re.MULTILINE)))
    if not declared:
        raise StudyError("No parameters are declared yet; run the cell above this one, which is tagged parameters.")
    if "engine" in declared and not LEGACY:
        raise StudyError(NO_LEGACY)
    injected = [name for cell in cells if cell.startswith("# Parameters") for name in _assigned(cell)]
    _no_others(injected, declared, "this notebook")
    values = _checked({name: namespace[name] for name in declared}, "")
    if "run_dir" in values:
        check_writable(Path(values["run_dir"]))
    return values


def _assigned(cell: str) -> list[str]:
    return [
        line.split("=")[0].strip() for line in cell.splitlines() if "=" in line and not line.startswith((" ", "#", "]"))
    ]


def _no_others(given: list[str], allowed: list[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise StudyError(f"{name} is not a parameter of {where}; it has {', '.join(allowed)}.")


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {name: (PARAMETERS[name], ...) for name in values}
    model = create_model("Parameters", __config__=ConfigDict(strict=True, extra="forbid"), **fields)
    return _validated(model, values, where).model_dump()


def _validated(model: type[BaseModel], values: Any, where: str) -> BaseModel:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the content"
        if first["type"] == "missing":
            raise StudyError(f"{where}{name} is missing; add it.") from error
        if first["type"] == "extra_forbidden":
            raise StudyError(f"{where}{name} is no key here; take it away or correct its name.") from error
        wanted = _lower(first["msg"])
        if first["type"] == "list_type":
            wanted = (
                f"a list is needed, as YAML: '{first['loc'][-1]}: [{first['input']}]' (papermill takes that after -y)"
            )
        raise StudyError(f"{where}{name} is {first['input']!r}; {wanted}.") from error


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


class Block(BaseModel):
    """Models to train: every combination of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    archs: Annotated[list[Arch], Field(min_length=1)]
    recipes: Annotated[list[RecipeName], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]
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

    def runs(self, notebook: str, model: Mapping[str, Any]) -> bool:
        """Whether this model goes through `notebook`; the first block that has it says so, and LEFT_OUT."""
        blocks = [block for block in self.models if model in block.models()][:1]
        return notebook not in LEFT_OUT and not any(notebook in block.leave_out for block in blocks)

    def arguments(self, notebook: str, name: str, **chosen: Any) -> dict[str, Any]:
        """The papermill parameters of one run of `notebook` under the profile called `name`; `chosen` wins."""
        declared = declared_parameters(notebook)
        own = [block.notebooks.get(notebook, {}) for block in self.models if chosen in block.models()][:1]
        values = {**self.common, **self.notebooks.get(notebook, {}), **(own[0] if own else {})}
        values |= {"run_dir": f"runs/{name}", **chosen}
        if "archs" in declared:
            values["archs"] = [model["arch"] for model in self.timed()]
        return {key: value for key, value in values.items() if key in declared}


def load_profile(name: str, folder: Path = Path("profiles")) -> Profile:
    """Read and check profiles/`name`.yml. Raises StudyError, naming file and key, for anything that no notebook would take."""
    path = folder / f"{name}.yml"
    if not path.exists():
        raise StudyError(f"profile is {name!r}; allowed are {', '.join(sorted(p.stem for p in folder.glob('*.yml')))}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    profile = _validated(Profile, content, f"{path}: ")
    assert isinstance(profile, Profile)
    declared = {notebook: declared_parameters(notebook) for notebook in NOTEBOOKS}
    settable = {notebook: [key for key in keys if key not in OF_THE_MODEL] for notebook, keys in declared.items()}
    of_models = [notebook for notebook in NOTEBOOKS if "arch" in declared[notebook]]
    _no_others(list(profile.common), sorted({key for keys in settable.values() for key in keys}), f"{path}: common")
    _checked(profile.common, f"{path}: common.")
    for notebooks, allowed in (
        (profile.notebooks, NOTEBOOKS),
        *((block.notebooks, of_models) for block in profile.models),
    ):
        _no_others(list(notebooks), list(allowed), f"{path}, which names notebooks here")
        for notebook, values in notebooks.items():
            for key in values.keys() & OF_THE_STUDY if notebook in of_models else ():
                raise StudyError(f"{path}: {notebook}.{key} is the same in all notebooks; give it under common.")
            _no_others(list(values), settable[notebook], f"{path}: {notebook}")
            _checked(values, f"{path}: {notebook}.")
    return profile


def declared_parameters(notebook: str, folder: Path = Path("notebooks")) -> list[str]:
    """Names in the parameters cell of a notebook. Raises StudyError when it has no such cell."""
    import nbformat

    for cell in nbformat.read(folder / f"{notebook}.ipynb", as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return [line.split(":")[0] for line in cell.source.splitlines() if ":" in line.split("#")[0]]
    raise StudyError(f"{notebook} has no cell tagged parameters.")


def ensure(record: Path | str, notebook: str, parameters: Mapping[str, Any], **chosen: Any) -> None:
    """Run `notebook` if its `record` is missing or stale, with those of `parameters` that it declares: any notebook runs alone.

    A record is stale when a record that it was made from (NEEDS) was made again afterwards. chosen: parameters that win over
    `parameters`. The executed notebook is kept beside the record's folder. Raises StudyError when the record was made with
    other values of parameters that both notebooks have: other images, or another quantization.
    """
    record = Path(record)
    asked = {**parameters, **chosen}
    why = f"{record} is missing"
    if record.exists():
        run = json.loads(record.read_text())["run"]
        _no_other_values(record, run["parameters"], asked)
        sources = [record.with_name(f"{name}.json") for name in made_from(record.stem, notebook)]
        newer = [source for source in sources if source.exists() and _date(source) > run["date"]]
        if not newer:
            return
        why = f"{record} is older than {newer[0].name}, from which it was made"
    import papermill

    print(f"{why}; {notebook} makes it: running it now with the same settings.", flush=True)
    values = {key: value for key, value in asked.items() if key in declared_parameters(notebook)}
    executed = record.parent.parent / "notebooks" / f"{record.stem}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    source = Path("notebooks") / f"{notebook}.ipynb"
    papermill.execute_notebook(source, executed, values, progress_bar=False, log_output=False, cwd=os.getcwd())


def made_from(run_id: str, notebook: str) -> Iterator[str]:
    """The names of the runs of the same model that a run of `notebook` takes results from, directly or not."""
    for other in NEEDS.get(notebook, []):
        source = run_id.replace(notebook, other, 1)
        yield source
        yield from made_from(source, other)


def _date(record: Path) -> str:
    return json.loads(record.read_text())["run"]["date"]


def _no_other_values(record: Path, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise StudyError if a record was made with other values than are asked for.

    Free are places, the engine, which is chosen anew whenever INT8 weights are loaded, and a precision that is asked for as
    `auto`: the machine that made the record had its own. Records keep no more calibration images than there are.
    """
    asked = dict(asked)
    if asked.get("precision") == "auto":
        del asked["precision"]
    if "calibration_images" in asked and "data" in made:
        there = TRAINING_IMAGES[made["data"]]
        asked["calibration_images"] = min(asked["calibration_images"], asked.get("limit") or there, there)
    for name in sorted((made.keys() & asked.keys()) - {"run_dir", "data_dir", "engine"}):
        if made[name] != asked[name]:
            raise StudyError(
                f"{name} is {asked[name]!r}, but {record} was made with {made[name]!r}; give that value or another run_dir, "
                f"or remove {record.parent.parent}."
            )
