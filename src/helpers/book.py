"""Put a run's results and executed notebooks between the pages of `book/`, and build the HTML.

Command line: python -m helpers.book runs/PROFILE ARCH RECIPE SEED for a run's own book, or python -m helpers.book published
for the book of the committed results.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from helpers.files import StudyError
from helpers.parameters import NOTEBOOKS, declared_parameters
from helpers.records import run_name

PAGES = Path("book")
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGE = re.compile(r"\[!\[(?P<text>[^]]*)\]\([^)]*\)\]\((?P<link>[^)]*)\)")


def copy_pages(target: Path) -> None:
    """Copy the hand-written pages, configuration and style of `book/` into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for source in PAGES.glob("*.*"):
        shutil.copy(source, target / source.name)
    shutil.copytree(PAGES / "_static", target / "_static", dirs_exist_ok=True)


def copy_chapter(executed: Path, chapter: Path) -> None:
    """Copy an executed notebook, so changed that the book loads nothing from other hosts.

    The Colab badge becomes a text link, and progress bars that need a widget library are left out.
    """
    if not executed.exists():
        raise StudyError(f"{executed} is missing; run its notebook first.")
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(r"[\g<text>](\g<link>)", cell.source)
        else:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    for leftover in ("papermill", "widgets"):
        notebook.metadata.pop(leftover, None)
    chapter.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, chapter)


def build(book: Path) -> Path:
    """Build the HTML; every warning is an error. Returns the first page. Raises StudyError with what went wrong."""
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        str(book),
        "-W",
        "-n",
        "--keep-going",
        "--quiet",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise StudyError(f"{book} could not be built:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return book / "_build" / "html" / "index.html"


def book_of_run(run: Path, arch: str, recipe: str, seed: int) -> Path:
    """Build the book of one run; its chapters are the executed notebooks of one model. Returns the first page."""
    book = run / "book"
    model = {"arch": arch, "recipe": recipe, "seed": seed}
    copy_pages(book)
    for notebook in NOTEBOOKS:
        name = run_name(notebook, **{key: model[key] for key in model if key in declared_parameters(notebook)})
        copy_chapter(run / "notebooks" / f"{name}.ipynb", book / "chapters" / f"{notebook}.ipynb")
    return build(book)


def published_book(target: Path = Path("runs/published/book")) -> Path:
    """Build the book of the committed results and chapters, without running anything. Returns the first page."""
    for part in ("results", "chapters"):
        if not (PAGES / part).exists():
            raise StudyError(
                f"{PAGES / part} is missing: nothing has been published yet. `make study` builds a book of your own."
            )
        shutil.copytree(PAGES / part, target / part, dirs_exist_ok=True)
    copy_pages(target)
    return build(target)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["published"]:
            print(f"Open {published_book()}")
        else:
            print(f"Open {book_of_run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))}")
    except StudyError as error:
        sys.exit(f"book: {error}")
