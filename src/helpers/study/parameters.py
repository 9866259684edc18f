"""Parameters of notebooks and profiles: what is allowed, said once, and checked before any work starts.

papermill only warns about a misspelt parameter and turns `-p epochs ten` into a string. So every notebook calls
`check_parameters` in the cell after its parameters, and `make study` reads a profile through `pipeline.load_profile`. The
lists of allowed words stand in the modules that they belong to.
"""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from helpers.files import StudyError, check_writable
from helpers.quantize.arms import ENGINES, LEGACY, NO_LEGACY, QCONFIG_NAMES
from helpers.report.schema import ARMS, TOOLS
from helpers.serve.load import SERVED
from helpers.train.data import DATA_NAMES
from helpers.train.models import ARCHS
from helpers.train.training import CHANGES, PRECISIONS, RECIPES

# No larger number means anything here, and many a larger one would fill the memory or never end.
LARGEST = {
    "count": 1_000_000,
    "seed": 2**31 - 1,
    "epochs": 10_000,
    "threads": 1_024,
    "batch": 4_096,
    "pixels": 1_024,
    "idle_ms": 60_000,
    "seconds": 86_400,
    "share": 100,
}
LONGEST = 1_000  # characters of a text


def _at_most(largest: str, least: int = 0) -> Any:
    return Annotated[int, Field(ge=least, le=LARGEST[largest])]


def _more_than_0(largest: str) -> Any:
    return Annotated[float, Field(gt=0, le=LARGEST[largest], allow_inf_nan=False)]


def _plain_text(text: str) -> str:
    """Without characters that no path may have, and no part of it longer than a file name may be."""
    if not text.isprintable() or any(len(part.encode()) > 255 for part in text.split("/")):
        raise PydanticCustomError("text", "take printable characters only, and at most 255 bytes between two slashes")
    return text


Text = Annotated[str, Field(max_length=LONGEST), AfterValidator(_plain_text)]
Count = _at_most("count")
Positive = _at_most("count", 1)
Seed = _at_most("seed")
Epochs = _at_most("epochs")
Threads = Annotated[list[_at_most("threads", 1)], Field(min_length=1)]


def _all_or_several(limit: int) -> int:
    if limit == 1:
        raise PydanticCustomError("limit", "use 0 for all images, or at least 2: batch norm needs two to train")
    return limit


def _none_or_three(values: list[float]) -> list[float]:
    if len(values) not in (0, 3):
        raise PydanticCustomError(
            "channels", "give a number for each of red, green and blue, or none for the usual ones"
        )
    return values


Means = Annotated[list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_none_or_three)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, le=1)]], AfterValidator(_none_or_three)]
Arch = Literal[*ARCHS]
RecipeName = Literal[*RECIPES]

# Every parameter that a notebook may declare: one name, one meaning, one range.
PARAMETERS: dict[str, Any] = {
    "arch": Arch,
    "recipe": RecipeName,
    "recipes": Annotated[list[RecipeName], Field(min_length=1)],
    "changes": list[Literal[*CHANGES]],
    "together": Annotated[list[Literal[*CHANGES]], Field(min_length=1)],
    "seed": Seed,
    "seeds": Annotated[list[Seed], Field(min_length=1)],
    "data": Literal[*DATA_NAMES],
    "data_dir": Text,
    "limit": Annotated[Count, AfterValidator(_all_or_several)],
    "run_dir": Annotated[Text, Field(min_length=1)],
    "start_from": Annotated[Text, Field(min_length=1)],
    "epochs": Epochs,
    "extra_epochs": Epochs,
    "precision": Literal[*PRECISIONS],
    "qconfig": Literal[*QCONFIG_NAMES],
    "engine": Literal[*ENGINES] if LEGACY else Text,  # without any, what needs one says so
    "calibration_images": Positive,
    "calibration_sizes": Annotated[list[Positive], Field(min_length=1)],
    "draws": Positive,
    "rounds": Positive,
    "threads": Threads,
    "batches": Annotated[list[_at_most("batch", 1)], Field(min_length=1)],
    "sizes": Annotated[list[_at_most("pixels", 1)], Field(min_length=1)],
    "idle_ms": Annotated[list[_at_most("idle_ms")], Field(min_length=1)],
    "app_seconds": _at_most("seconds", 1),
    "probed_images": Positive,
    "control_images": Positive,
    "archs": Annotated[list[Arch], Field(min_length=1)],
    "arms": list[Literal[*ARMS]],
    "as_reference": bool,
    "first_calls": bool,
    "cores": _at_most("threads"),
    "served": Annotated[list[Literal[*SERVED]], Field(min_length=1)],
    "tools": Annotated[list[Literal[*TOOLS]], Field(min_length=1)],
    "shares": Annotated[list[_more_than_0("share")], Field(min_length=1)],
    "seconds": _more_than_0("seconds"),
    "limit_ms": Annotated[float, Field(gt=0, le=1000 * LARGEST["seconds"], allow_inf_nan=False)],
    "model": Text,
    "pretrained": bool,
    "images": Text,
    "size": _at_most("pixels"),
    "mean": Means,
    "std": Deviations,
    "width": Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)],
}


def check_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Check the parameters of the running notebook and return them by name, working from the study's top folder from now on.

    namespace: the notebook's `globals()`. What its cells (`In`) annotate are the declared parameters; what papermill injected
    must be among them. Raises StudyError outside of the study, when no cell that ran declares any, for an unknown name, a wrong type, a value that is
    not allowed, a run_dir that cannot be written, or an INT8 engine where PyTorch has none.
    """
    _go_to_the_top()
    cells = namespace.get("In", [])
    declared = list(dict.fromkeys(name for cell in cells for name in re.findall(r"^(\w+): \w+ = ", cell, re.MULTILINE)))
    if not declared:
        raise StudyError("No parameters are declared yet; run the cell above this one, which is tagged parameters.")
    if "engine" in declared and not LEGACY:
        raise StudyError(NO_LEGACY)
    injected = [name for cell in cells if cell.startswith("# Parameters") for name in _assigned(cell)]
    no_others(injected, declared, "this notebook")
    values = checked({name: namespace[name] for name in declared}, "")
    if "run_dir" in values:
        check_writable(Path(values["run_dir"]))
    return values


def _go_to_the_top() -> None:
    """Change to the folder that all paths are relative to: above the notebook's own, or where Colab's setup put it."""
    here = Path.cwd()
    for folder in (here, *here.parents, here / "study"):
        if (folder / "Snakefile").exists():
            return os.chdir(folder)
    raise StudyError(f"The study was not found in {here} or above; start this notebook from within its folder.")


def _assigned(cell: str) -> list[str]:
    return [
        line.split("=")[0].strip() for line in cell.splitlines() if "=" in line and not line.startswith((" ", "#", "]"))
    ]


def no_others(given: list[str], allowed: list[str], where: str) -> None:
    """Raise StudyError for the first of the `given` names that is not `allowed`; where: the text names what has these."""
    for name in given:
        if name not in allowed:
            raise StudyError(f"{_shown(name)} is not a parameter of {where}; it has {', '.join(allowed)}.")


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """These parameters, checked against PARAMETERS. Raises StudyError, whose text begins with `where`, for a wrong value."""
    fields = {name: (PARAMETERS[name], ...) for name in values}
    model = create_model("Parameters", __config__=ConfigDict(strict=True, extra="forbid"), **fields)
    return validated(model, values, where).model_dump()


def validated(model: type[BaseModel], values: Any, where: str) -> BaseModel:
    """`values` as a `model`. Raises StudyError, whose text begins with `where`, for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(_shown(part) for part in first["loc"]) or "the content"
        if first["type"] == "missing":
            raise StudyError(f"{where}{name} is missing; add it.") from error
        if first["type"] == "extra_forbidden":
            raise StudyError(f"{where}{name} is no key here; take it away or correct its name.") from error
        wanted = _lower(first["msg"])
        if first["type"] == "list_type":
            wanted = f"a list is needed, as YAML: '{_shown(first['loc'][-1])}: [{_shown(first['input'])}]' (papermill takes that after -y)"
        raise StudyError(f"{where}{name} is {_short.repr(first['input'])}; {wanted}.") from error


class _Short(reprlib.Repr):
    """Of a number with more digits than Python writes, the type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:
            return "a number of thousands of digits"


_short = _Short()


def _shown(value: Any) -> str:
    """A name as it is, anything else as Python writes it, shortened and on one line."""
    text = _short.repr(value)
    return text[1:-1] if isinstance(value, str) else text


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
