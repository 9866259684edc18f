"""Files appear whole or not at all, and what goes wrong is said in one sentence."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        first_line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise NotWritten(f"The disk is full ({error.filename or first_line}); free some space.") from error
        raise StudyError(f"{what} ({first_line}).") from error


def check_writable(folder: Path) -> None:
    """Raise NotWritten if not even a megabyte can be written into `folder`."""
    with whole_file(Path(folder) / ".writable") as aside:
        aside.write_bytes(bytes(2**20))
    (Path(folder) / ".writable").unlink(missing_ok=True)
