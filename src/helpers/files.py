"""Files appear whole or not at all, and what goes wrong is said in one sentence."""

import errno
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np


class StudyError(ValueError):
    """Something the person running the study can put right; its text says what was given, what is allowed, what to do."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a traceback: the sentence is all a reader needs."""
        return [f"{type(self).__name__}: {self}"]


class NotWritten(StudyError):
    """A file could not be written: no fault of what was to be written, so it ends the work."""


UNFINISHED = ".unfinished-"  # folders of files that are being written begin so
# What the system says when there is no room or no right to write; writers have exceptions of their own, which repeat it.
NO_ROOM = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside it; move the file to `path` once the block has ended without an error.

    A failure leaves what stood at `path` untouched. Of a process that is killed meanwhile the folder stays, see
    `remove_unfinished`. Raises NotWritten when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=UNFINISHED))
        aside = folder / path.name
        yield aside
        os.replace(aside, path)
    except StudyError:
        raise
    except Exception as error:
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20
        said = next((words for words in NO_ROOM if words in str(error)), None)
        # What the block wanted to read is missing, and not the folder that it writes into.
        unread = isinstance(error, FileNotFoundError) and folder is not None and folder.exists()
        if unread or not (full or said or isinstance(error, OSError)):
            raise
        why = "the disk is full" if full else said or getattr(error, "strerror", None) or error
        raise NotWritten(
            f"{path} could not be written ({why}); free some space or choose a place that can be written. "
            "What was there before is unchanged."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had not finished writing anywhere in `folder`, in which nobody else writes now."""
    for unfinished in [*Path(folder).rglob(f"{UNFINISHED}*")]:
        shutil.rmtree(unfinished, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """What a tool said, on one line of at most 300 characters: the kind of its error, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn what a tool raises into a StudyError, so that a row that cannot be had ends no notebook; what: the sentence."""
    try:
        yield
    except StudyError:
        raise
    except Exception as error:  # each tool has its own, and dynamo wraps what Inductor raises
        chain = [error, error.__cause__, getattr(error, "inner_exception", None)]
        if any(type(link).__name__ == "InvalidCxxCompiler" for link in chain):
            raise StudyError("Inductor found no C++ compiler; install g++ (Debian: apt-get install g++).") from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise NotWritten(f"The disk is full ({error.filename or first_line(error)}); free some space.") from error
        raise StudyError(f"{what} ({first_line(error)}).") from error


def path_given(text: str) -> Path:
    """The path that somebody gave, `~` expanded. Raises StudyError for one that this machine cannot look at."""
    with refused(f"{text[:200]!r} cannot be looked at; give another path"):
        path = Path(text).expanduser()
        path.exists()
    return path


def check_writable(folder: Path) -> None:
    """Raise NotWritten if not even a megabyte can be written into `folder`."""
    with whole_file(Path(folder) / ".writable") as aside:
        aside.write_bytes(bytes(2**20))
    (Path(folder) / ".writable").unlink(missing_ok=True)


# Within how many bytes of its start (an IR: of its end) a file of each format says its own CRC-32. What another tool writes
# anew says none there.
_SEAL_WITHIN = {".json": 64, ".safetensors": 4096, ".onnx": 32, ".xml": 64}
_SEAL = re.compile(rb"crc32\W{1,5}([0-9a-f]{8})")
UNSEALED = {"crc32": "00000000"}  # what a writer of JSON or safetensors puts in, for `seal` to fill
_ZIPS = (".npz", ".pt", ".pt2")


def seal(path: Path) -> None:
    """Write the CRC-32 of a file into it, so that `check_whole` can tell whether it was damaged since.

    path: .json or .safetensors with UNSEALED in it, an ONNX file, or an OpenVINO IR (.xml), of which the .bin counts, too.
    """
    if path.suffix == ".onnx":
        # An entry of metadata_props as protobuf writes it, where protobuf itself never puts it: first.
        path.write_bytes(b"r\x11\n\x05crc32\x12\x0800000000" + path.read_bytes())
    if path.suffix == ".xml":
        path.write_bytes(path.read_bytes() + b"\n<!-- crc32 00000000 -->\n")
    at, _ = _sealed(path)
    found = _crc32(path, at)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"%08x" % found)


def check_whole(path: Path) -> None:
    """Raise StudyError if a file is missing or not as it was written: by the CRC-32 that `seal` left, or by those of a zip archive.

    Checked once in each process, so that no measured time of loading has it. A file of another format, or one that says no
    CRC-32 because an earlier version or another tool wrote it, passes.
    """
    try:
        facts = os.stat(path)
        _check_whole(Path(path), facts.st_size, facts.st_mtime_ns)
    except StudyError:
        raise
    except FileNotFoundError as error:
        raise StudyError(f"{error.filename} does not exist; run the notebook that makes it first.") from error
    except Exception as error:  # zipfile and zlib have several of their own
        raise StudyError(f"{path} is damaged ({first_line(error)}); make it again.") from error


@cache
def _check_whole(path: Path, size: int, changed_ns: int) -> None:
    if path.suffix in _ZIPS:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            broken = archive.testzip()
            file.seek(-22, os.SEEK_END)  # to the record that ends an archive: Python does not look at its count
            count = int.from_bytes(file.read()[10:12], "little")
        if broken or not count or count != len(archive.namelist()):
            raise StudyError(f"{path} is damaged (in {broken or 'its table of contents'!r}); make it again.")
    elif path.suffix in _SEAL_WITHIN:
        at, said = _sealed(path)
        if at and said != _crc32(path, at):
            raise StudyError(f"{path} is damaged or was changed (its CRC-32 is not what it says); make it again.")


def _sealed(path: Path) -> tuple[int, int]:
    """Where the eight digits of a file's CRC-32 begin, and their value; (0, 0) where it says none."""
    within = _SEAL_WITHIN[path.suffix]
    first = max(0, path.stat().st_size - within) if path.suffix == ".xml" else 0
    with path.open("rb") as file:
        file.seek(first)
        found = _SEAL.search(file.read(within))
    return (first + found.start(1), int(found[1], 16)) if found else (0, 0)


def _crc32(path: Path, at: int) -> int:
    """Of a file with zeros for the eight digits at `at`, and of the weights beside an IR; a piece at a time, to take no memory."""
    with path.open("rb") as file:
        found = zlib.crc32(b"00000000", zlib.crc32(file.read(at)))
        file.seek(at + 8)
        found = _crc32_of_rest(file, found)
    if path.suffix == ".xml":
        with path.with_suffix(".bin").open("rb") as weights:
            found = _crc32_of_rest(weights, found)
    return found


def _crc32_of_rest(file: BinaryIO, found: int) -> int:
    while piece := file.read(2**20):
        found = zlib.crc32(piece, found)
    return found


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz by name. Raises StudyError when it is missing or damaged."""
    check_whole(path)
    with refused(f"{path} is damaged; make it again"), np.load(path) as stored:
        return dict(stored)
