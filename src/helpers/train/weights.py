"""Weights as safetensors files, which hold no pickle."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.files import UNSEALED, StudyError, check_whole, refused, seal, whole_file
from helpers.train.models import ARCHS


def weights_path(run_dir: str, arch: str, recipe: str, seed: int, arm: str, suffix: str = ".safetensors") -> Path:
    """Where the model of one arm lies: `suffix` .safetensors, or that of an export (serve.export.SUFFIXES)."""
    return Path(run_dir) / "weights" / f"{arch}-{recipe}-s{seed}-{arm}{suffix}"


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors; `metadata` must name the `arch` and says how the weights came to be."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with whole_file(path) as aside:
        save_file(state, aside, metadata=metadata | UNSEALED)
        seal(aside)


def load_weights(path: Path, arch: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file written by `save_weights`: (state dict, metadata). With `arch`, insist that the file is of that one.

    Raises StudyError when the file is missing, damaged, foreign or of another architecture.
    """
    check_whole(path)
    with (
        refused(f"{path} is not a whole safetensors file; delete it and make it again"),
        safe_open(path, framework="pt") as file,
    ):
        metadata = {name: value for name, value in (file.metadata() or {}).items() if name not in UNSEALED}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if metadata.get("arch") not in ARCHS:
        raise StudyError(
            f"{path} does not say which arch it is, so it is not from this study; delete it and make it again."
        )
    if arch is not None and metadata["arch"] != arch:
        raise StudyError(f"{path} holds a {metadata['arch']}, not a {arch}; give the arch it was made with.")
    return state, metadata


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put `state` into `model`. Raises StudyError, naming `path`, when names or shapes differ."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StudyError(
            f"{path} does not fit the model ({str(error).splitlines()[0]}); delete it and make it again."
        ) from error
