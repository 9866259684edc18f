"""Reading and writing OpenVINO's own files, its IR. OpenVINO is imported where it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

from helpers.files import check_whole, seal, whole_file

if TYPE_CHECKING:
    import openvino


def read_openvino(path: Path) -> "openvino.Model":
    """Read an OpenVINO IR (.xml, its .bin beside it) or an ONNX file. Raises StudyError for a damaged one (`files.check_whole`)."""
    import openvino

    check_whole(path)
    return openvino.Core().read_model(path)


def save_openvino(model: "openvino.Model", path: Path) -> None:
    """Write an OpenVINO IR: `path` (.xml) and the .bin beside it. Weights keep their type (the default would halve them)."""
    import openvino

    with whole_file(path) as aside:
        openvino.save_model(model, aside, compress_to_fp16=False)
        seal(aside)
        path.unlink(missing_ok=True)  # a graph never stands beside the weights of another one
        aside.with_suffix(".bin").replace(path.with_suffix(".bin"))
