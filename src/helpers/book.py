"""Put a run's results and executed notebooks between the pages of `book/`, and build the HTML.

Command line: python -m helpers.book run PROFILE for the book of a run; publish PROFILE to add a run's results and chapters to the
committed ones; published for the book of those.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import papermill

from helpers.files import StudyError, whole_file
from helpers.pipeline import NOTEBOOKS, READERS, declared_parameters, load_profile
from helpers.records import gather, read_results, run_name

PAGES = Path("book")
WIDGET = "application/vnd.jupyter.widget-view+json"
FOUND = re.compile(r"(<!-- found -->).*(<!-- end of found -->)", re.DOTALL)
INCLUDED = re.compile(r"^\s*```\{include\} (results/\S+\.md)", re.MULTILINE)
NOT_DONE = "This run has not done this part."
EARLIER = "Executed with an earlier version of this notebook, whose code is shown; today's differs under "
PLACEHOLDER = "/github/example/"  # until `make repository` has given the study its address
BADGE = re.compile(r"\[!\[(?P<text>[^]]*)\]\([^)]*\)\]\((?P<link>[^)]*)\)")


def copy_pages(target: Path) -> None:
    """Copy the hand-written pages, configuration and style of `book/` into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for source in PAGES.glob("*.*"):
        shutil.copy(source, target / source.name)
    shutil.copytree(PAGES / "_static", target / "_static", dirs_exist_ok=True)


def copy_chapter(executed: Path, chapter: Path) -> None:
    """Copy an executed notebook, so changed that the book loads nothing from other hosts.

    The Colab badge becomes a text link (see `_without_badge`), and progress bars that need a widget library are left out.
    Raises StudyError when the notebook was not run.
    """
    if not executed.exists():
        raise StudyError(f"{executed} is missing; run its notebook first.")
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _without_badge(cell.source)
        else:
            cell.outputs = [output for output in cell.outputs if not _shows_nothing(output)]
    for leftover in ("papermill", "widgets"):
        notebook.metadata.pop(leftover, None)
    chapter.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, chapter)


def renew_text(chapter: Path, source: Path) -> None:
    """Give a chapter the text that its notebook has today; where other code was executed, say so and where under its title instead.

    The setup cell, which only finds the study, and comments count as text.
    """
    executed, today = nbformat.read(chapter, as_version=4), nbformat.read(source, as_version=4)
    own = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    before, now = _parts(own), _parts(today.cells)
    different = [title for title, does in before if does not in [new for _, new in now]]
    different += [title for title, does in now if does not in [old for _, old in before]]
    if different:
        _note_under_title(executed, EARLIER + ", ".join(f'"{title}"' for title in dict.fromkeys(different)) + ".")
    else:
        for cell, new in zip(own, today.cells, strict=True):
            cell.metadata |= new.metadata  # captions
            cell.source = _without_badge(new.source) if cell.cell_type == "markdown" else new.source
    nbformat.write(executed, chapter)


def _note_under_title(notebook: nbformat.NotebookNode, text: str) -> None:
    notebook.cells[0].source += f"\n\n:::{{note}}\n{text}\n:::"


def _without_badge(text: str) -> str:
    """The Colab badge as a text link, because the book loads nothing from other hosts; without one while its address is a placeholder."""
    return BADGE.sub(lambda badge: "" if PLACEHOLDER in badge["link"] else f"[{badge['text']}]({badge['link']})", text)


def _parts(cells: list[nbformat.NotebookNode]) -> list[tuple[str, list[str]]]:
    """Each heading, and what the cells under it do: syntax trees, which comments and line breaks do not change; "" for text and setup."""
    parts: list[tuple[str, list[str]]] = []
    for cell in cells:
        text = cell.cell_type == "markdown"
        if not parts or (text and cell.source.startswith("#")):
            parts.append((cell.source.splitlines()[0].strip("# "), []))
        parts[-1][1].append("" if text or _is_setup(cell) else ast.dump(ast.parse(cell.source)))
    return parts


def _is_setup(cell: nbformat.NotebookNode) -> bool:
    return "setup" in cell.metadata.get("tags", [])


def _shows_nothing(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar that needs a widget library, a complaint that there is none, or the blank that it leaves."""
    text = output.get("text")
    return WIDGET in output.get("data", {}) or (
        text is not None and (not text.strip() or "IProgress not found" in text)
    )


def copy_unexecuted(notebook: str, chapters: Path) -> None:
    """Copy a notebook that the run has left out or not finished yet: its source, and a note that says so under its title."""
    copy_chapter(Path("notebooks") / f"{notebook}.ipynb", chapters / f"{notebook}.ipynb")
    chapter = nbformat.read(chapters / f"{notebook}.ipynb", as_version=4)
    _note_under_title(chapter, f"{NOT_DONE} This is its source, without outputs.")
    nbformat.write(chapter, chapters / f"{notebook}.ipynb")


def is_finished(executed: Path) -> bool:
    """Whether papermill ran this notebook to its end without an error."""
    if not executed.exists():
        return False
    papermill_says = nbformat.read(executed, as_version=4).metadata.get("papermill", {})
    return bool(papermill_says.get("end_time")) and not papermill_says.get("exception")


def build(book: Path) -> Path:
    """Build the HTML; every warning is an error. Returns the first page. Raises StudyError with what went wrong.

    Where a page includes results that the run does not have, it says so.
    """
    for name in {name for page in book.glob("*.md") for name in INCLUDED.findall(page.read_text())}:
        if not (book / name).exists():
            (book / name).write_text(f"*{NOT_DONE}*\n")
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
        lines = f"{result.stdout}\n{result.stderr}".splitlines()
        said = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-20:]
        raise StudyError("\n".join([f"{book} could not be built:", *said]))
    return book / "_build" / "html" / "index.html"


def executed_notebook(notebook: str, profile: str) -> Path:
    """Where the run of a profile keeps an executed notebook; of those that handle one model, its first model's."""
    model = load_profile(profile).trained()[0]
    chosen = {key: model[key] for key in model if key in declared_parameters(notebook)}
    return Path("runs") / profile / "notebooks" / f"{run_name(notebook, **chosen)}.ipynb"


def book_of_run(profile: str) -> Path:
    """Build the book of one run. Returns the first page."""
    book = Path("runs") / profile / "book"
    copy_pages(book)
    settings = load_profile(profile)
    for notebook in NOTEBOOKS:
        if settings.runs(notebook, settings.trained()[0]):
            copy_chapter(executed_notebook(notebook, profile), book / "chapters" / f"{notebook}.ipynb")
        else:
            copy_unexecuted(notebook, book / "chapters")
    return build(book)


def publish(profile: str, published: Path = PAGES, readme: Path = Path("README.md")) -> Path:
    """Add what a run has finished to the committed results and chapters in `published`; nothing is trained or timed.

    Results of other runs stay, so a study that took several machines or days comes together. The book of all that is
    built, and what it found goes into `readme`; without a run, of what is there already. Returns the book's first page.
    """
    with TemporaryDirectory() as folder:  # what was published before stays as it was until the new book is built
        aside = Path(folder)
        for part in ("results", "chapters"):
            if (published / part).exists():
                shutil.copytree(published / part, aside / part)
        if list((Path("runs") / profile / "records").glob("*.json")) or not (aside / "results").exists():
            gather(str(Path("runs") / profile), aside / "results", keep=True)
        for notebook in NOTEBOOKS:
            if notebook not in READERS and is_finished(executed_notebook(notebook, profile)):
                copy_chapter(executed_notebook(notebook, profile), aside / "chapters" / f"{notebook}.ipynb")
        page = published_book(published=aside)
        found = page.parents[2] / "results"
        shutil.copy(found / "overview.png", aside / "results" / "overview.png")
        text = whats_found(found)
        shutil.copytree(aside, published, dirs_exist_ok=True)
    with whole_file(readme) as aside:
        aside.write_text(FOUND.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", readme.read_text()))
    return page


def whats_found(results: Path) -> str:
    """Markdown for the README's first screen: three answers, then which rows to take, a picture of all, whether QAT pays, whether PTQ's default holds and why not."""
    answers = "\n".join((results / f"short_{name}.md").read_text().strip() for name in ("choice", "qat", "default"))
    headline, qat, default, collapse = (
        (results / f"{name}.md").read_text().strip() for name in ("headline", "qat", "default", "collapse")
    )
    shows = "Accuracy minus that of FP32 trained as long, in points, against latency; the chosen rows in colour, with 95 % intervals"
    picture = f'<img src="book/results/overview.png" width="420" alt="{shows}">'
    pays = "Does QAT beat PTQ of an FP32 model that trained equally long?"
    short, note, *_ = qat.split("\n\n")
    holds = "Does PTQ hold with PyTorch's default observers, and with ranges that leave out the most extreme 5 % of the calibration images at either end?"
    lines = [line for line in collapse.splitlines() if line.startswith("- ")]
    causes = [*lines[:1], *lines[2:]]  # that it collapses, on what, and what was taken away and given
    why = "Where does the collapse come from? From ResNet50s that were trained briefly to find out:"
    return "\n\n".join(
        [answers, headline, picture, pays, short, note, holds, default, why, "\n".join(causes) or collapse]
    )


def published_book(run: Path = Path("runs/published"), published: Path = PAGES) -> Path:
    """Build the book of the committed results and chapters; only the notebooks that read records run. Returns the first page.

    Raises StudyError when nothing was published or nothing of it was timed, and with what went wrong in building.
    """
    book = run / "book"
    for part in ("results", "chapters"):
        if not (published / part).exists():
            raise StudyError(
                f"{published / part} is missing: nothing has been published yet. `make study` builds a book of your own."
            )
        shutil.rmtree(book / part, ignore_errors=True)
        shutil.copytree(published / part, book / part)
    copy_pages(book)
    for notebook in NOTEBOOKS:
        chapter = book / "chapters" / f"{notebook}.ipynb"
        if chapter.exists():
            renew_text(chapter, Path("notebooks") / chapter.name)
        elif notebook not in READERS:
            copy_unexecuted(notebook, book / "chapters")
    (run / "notebooks").mkdir(exist_ok=True)
    archs = sorted(read_results(book / "results")["latency"]["arch"].unique())
    if not archs:
        raise StudyError(f"{published / 'results'} has no latencies; publish a run that has finished its benchmark.")
    for notebook in READERS:
        executed = run / "notebooks" / f"{notebook}.ipynb"
        values = {"run_dir": str(run), "archs": archs}
        declared = {key: values[key] for key in values if key in declared_parameters(notebook)}
        papermill.execute_notebook(f"notebooks/{notebook}.ipynb", executed, declared, progress_bar=False)
        copy_chapter(executed, book / "chapters" / f"{notebook}.ipynb")
    return build(book)


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["run", name]:
                print(f"Open {book_of_run(name)}")
            case ["publish", name]:
                print(f"Open {publish(name)}")
            case ["published"]:
                print(f"Open {published_book()}")
            case other:
                raise StudyError(f"{other} is given; allowed are run PROFILE, publish PROFILE and published.")
    except StudyError as error:
        sys.exit(f"book: {error}")
    except papermill.PapermillExecutionError as error:
        sys.exit(f"book: {str(error).strip().splitlines()[-1]}")
