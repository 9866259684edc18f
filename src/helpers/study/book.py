"""Put results and executed notebooks between the hand-written pages of `book/`, and build the HTML.

Command line: python -m helpers.study.book run PROFILE for the book of a run; publish PROFILE to add a run's results and chapters to the
committed ones; published for the book of those.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pandas as pd
import papermill
import yaml

from helpers.files import UNFINISHED, StudyError, whole_file
from helpers.report import claims, figures, tables
from helpers.report.results import Results
from helpers.study.pipeline import NOTEBOOKS, READERS, WITH_PARENT, collect, load_profile, read_notebook

PAGES = Path("book")
README = Path("README.md")
WIDGET = "application/vnd.jupyter.widget-view+json"
BLANK = re.compile(r"\s*<pre[^>]*>\s*</pre>\s*")  # what a bar of the rich library leaves
TABLE = re.compile(r"(<!-- table -->\n).*(<!-- end of table -->)", re.DOTALL)
BADGE = re.compile(r"\[!\[(?P<text>[^]]*)\]\([^)]*\)\]\((?P<link>[^)]*)\)")
PLACEHOLDER = "/github/example/"  # until `make repository` has given the study its address
STYLED = re.compile(r"\bT_[0-9a-f]{5}(?=_|\b)")  # a table of pandas' Styler
LINK = re.compile(r"\[(?P<text>[^]]+)\]\((?P<file>[\w/.]+\.(?:ipynb|md))(?P<anchor>#[^)]*)?\)")
EARLIER = ":::{note}\nExecuted with an earlier version of this notebook, whose code is shown.\n:::"
NOTHING = "*Not measured.*\n"


def copy_pages(target: Path) -> None:
    """Copy the hand-written pages, configuration and style of `book/` into `target`; marks of claims become links to them."""
    target.mkdir(parents=True, exist_ok=True)
    for source in PAGES.glob("*.*"):
        shutil.copy(source, target / source.name)
    for page in target.glob("*.md"):
        page.write_text(claims.CITED.sub(r"[<sup>claim</sup>](#claim-\1)", page.read_text()))
    shutil.copytree(PAGES / "_static", target / "_static", dirs_exist_ok=True)


def copy_chapter(executed: Path, chapter: Path) -> None:
    """Copy an executed notebook, so changed that the book loads nothing from other hosts, and that the same run gives the same file.

    The Colab badge becomes a text link, progress bars that need a widget library are left out, and tables, which pandas names
    at random, are numbered. Raises StudyError when the notebook was not run.
    """
    if not executed.exists():
        raise StudyError(f"{executed} is missing; run its notebook first.")
    notebook = read_notebook(executed)
    numbers: dict[str, str] = defaultdict(lambda: f"T_{len(numbers):05d}")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(_text_link, cell.source)
        else:
            cell.outputs = [output for output in cell.outputs if not _shows_nothing(output)]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = STYLED.sub(lambda name: numbers[name[0]], output.data["text/html"])
    for leftover in ("papermill", "widgets"):
        notebook.metadata.pop(leftover, None)
    chapter.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, chapter)


def _text_link(badge: re.Match[str]) -> str:
    return "" if PLACEHOLDER in badge["link"] else f"[{badge['text']}]({badge['link']})"


def _shows_nothing(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar, a complaint that a widget library for it is missing, or the blank that it leaves."""
    text, data = output.get("text"), output.get("data", {})
    if WIDGET in data or BLANK.fullmatch(data.get("text/html", "")):
        return True
    return text is not None and (not text.strip() or "IProgress not found" in text or text.startswith("\r"))


def is_of_today(chapter: Path, source: Path) -> bool:
    """Whether a chapter was executed with the code that its notebook has today; comments and the setup cell do not count."""
    return _code(chapter) == _code(source)


def _code(notebook: Path) -> list[str]:
    cells = read_notebook(notebook).cells
    left_out = {"setup", "parameters", "injected-parameters"}
    return [
        ast.dump(ast.parse(cell.source))
        for cell in cells
        if cell.cell_type == "code" and not left_out & {*cell.metadata.get("tags", [])}
    ]


def mark_if_earlier(chapter: Path, source: Path) -> None:
    """Say under the title of a chapter that other code was executed than its notebook has today."""
    if not is_of_today(chapter, source):
        notebook = read_notebook(chapter)
        notebook.cells[0].source += f"\n\n{EARLIER}"
        nbformat.write(notebook, chapter)


def write_data(published: Results, book: Path, here: Results | None = None) -> None:
    """Write the tables and figures that pages include, into `book`/data: those of the published results.

    here: results of the reader's own run, whose verdicts on the published claims stand beside the published ones.
    """
    data = book / "data"
    data.mkdir(parents=True, exist_ok=True)
    frames = {
        "readme": readme_table(published),
        "machines": tables.side_by_side(tables.machines(published)),
        "machines_by_size": tables.side_by_side(tables.machines_by_size(published)),
        "settings": tables.settings(published),
        "reference1": tables.reference(published, 1),
        "reference2": tables.reference(published, 2),
        "reference_claims": tables.reference_claims(published),
        "runs": tables.runs(published),
        "verdicts": verdicts(published, here),
    }
    for name, frame in frames.items():
        (data / f"{name}.md").write_text(_markdown(frame))
    (data / "evidence.md").write_text(evidence(published, book))
    for name in ("carry_over", "collapse"):
        if (figure := getattr(figures, name)(published)) is not None:
            figure.savefig(data / f"{name}.png", dpi=110)


def readme_table(results: Results) -> pd.DataFrame:
    """The table of README and findings: `tables.first_screen` with milliseconds, and times faster, in one column."""
    text = tables.as_text(tables.first_screen(results))
    for column in [column for column in text if column.endswith(", ms")]:
        condition = column.removesuffix(", ms")
        text[column] = text[column] + " (" + text.pop(f"{condition}, times") + "x)"
        text = text.rename(columns={column: condition})
    return text


def _markdown(frame: pd.DataFrame) -> str:
    return tables.as_text(frame).to_markdown(index=False) + "\n" if len(frame) else NOTHING


def verdicts(published: Results, here: Results | None = None) -> pd.DataFrame:
    """A line for each claim: its sentence, linked to what it rests on, and whether it holds in the published results and here."""
    checked = claims.check(published)
    links = [f"[{line.sentence}](#claim-{line.id})" for line in checked.itertuples()]
    frame = pd.DataFrame({"claim": links, "published": checked.status})
    return frame if here is None else frame.assign(**{"this run": claims.check(here).status})


def evidence(results: Results, book: Path) -> str:
    """Markdown for the claims page: under the id of each claim the values behind it, and where their records come from."""
    every = claims.evidence(results)
    parts = []
    for claim in claims.CLAIMS:
        of = every[every.id == claim.id]
        values = of[["what", "value", "low", "high", "unit", "n", "seeds", "status"]]
        parts += [f"(claim-{claim.id})=\n### {claim.id}", claim.sentence, _markdown(values.reset_index(drop=True))]
        machines = [machine for machine in dict.fromkeys(of.machine) if machine]
        parts += [f"Timed on: {machine}." for machine in machines]
        runs = dict.fromkeys(run for ids in of.run_ids for run in ids.split())
        if runs:
            parts.append("Records: " + ", ".join(_origin(run, results, book) for run in runs) + ".")
    return "\n\n".join(parts) + "\n"


def _origin(run_id: str, results: Results, book: Path) -> str:
    """A run_id, linked to the executed chapter of its notebook where the book has one, with its commit."""
    notebook = run_id.split("-")[0]
    chapter = book / "chapters" / f"{notebook}.ipynb"
    link = f"[{run_id}](/chapters/{notebook}.ipynb)" if chapter.exists() else f"`{run_id}`"
    return f"{link} ({results.runs.get(run_id, {}).get('commit', 'unknown')[:9]})"


def only_what_is_there(book: Path) -> None:
    """Take chapters that the book lacks out of its table of contents, and make links to them text."""
    contents = yaml.safe_load((book / "_toc.yml").read_text())
    for part in contents["parts"]:
        part["chapters"] = [
            entry
            for entry in part["chapters"]
            if any((book / f"{entry['file']}{suffix}").exists() for suffix in (".md", ".ipynb"))
        ]
    contents["parts"] = [part for part in contents["parts"] if part["chapters"]]
    (book / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))
    for page in [*book.glob("*.md"), *(book / "data").glob("*.md")]:
        page.write_text(_without_dead_links(page.read_text(), book, book))
    for chapter in (book / "chapters").glob("*.ipynb"):
        notebook = read_notebook(chapter)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _without_dead_links(cell.source, chapter.parent, book)
        nbformat.write(notebook, chapter)


def _without_dead_links(text: str, folder: Path, book: Path) -> str:
    """Links are relative to the `folder` of their page, or, when they begin with a slash, to the top of the `book`."""

    def there(file: str) -> bool:
        return (book / file[1:] if file.startswith("/") else folder / file).exists()

    return LINK.sub(lambda link: link[0] if there(link["file"]) else link["text"], text)


def build(book: Path) -> Path:
    """Build the HTML, which takes the place of an earlier one when it is whole; every warning is an error. Returns the first page.

    Raises StudyError with what went wrong.
    """
    only_what_is_there(book)
    jupyter_book = str(Path(sys.executable).parent / "jupyter-book")
    with TemporaryDirectory(dir=book.parent, prefix=UNFINISHED) as folder:
        command = [*WITH_PARENT, jupyter_book, "build", str(book), "-W", "-n", "--keep-going", "--quiet"]
        result = subprocess.run([*command, "--path-output", folder], capture_output=True, text=True)
        if result.returncode:
            lines = f"{result.stdout}\n{result.stderr}".splitlines()
            said = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-20:]
            raise StudyError("\n".join([f"{book} could not be built:", *said]))
        shutil.rmtree(book / "_build", ignore_errors=True)
        (Path(folder) / "_build").rename(book / "_build")
    return book / "_build" / "html" / "index.html"


def executed_notebook(notebook: str, profile: str) -> Path:
    """Where the run of a profile keeps an executed notebook; of those that handle one model, its first model's."""
    return Path("runs") / profile / "notebooks" / f"{load_profile(profile).run_id(notebook)}.ipynb"


def book_of_run(profile: str) -> Path:
    """Build the book of one run: its chapters, its verdicts, and the published findings. Returns the first page."""
    settings = load_profile(profile)  # before anything is removed: `profile` becomes a path
    book = Path("runs") / profile / "book"
    shutil.rmtree(book / "chapters", ignore_errors=True)
    copy_pages(book)
    for notebook in NOTEBOOKS:
        if settings.planned(notebook):
            copy_chapter(executed_notebook(notebook, profile), book / "chapters" / f"{notebook}.ipynb")
    write_data(Results.open(PAGES / "results"), book, Results.open(book / "results"))
    return build(book)


def published_book(run: Path = Path("runs/published"), published: Path = PAGES) -> Path:
    """Build the book of the committed results and chapters; nothing is executed. Returns the first page.

    Raises StudyError when nothing was published, and with what went wrong in building.
    """
    book = _published_copy(run, published)
    copy_pages(book)
    for chapter in (book / "chapters").glob("*.ipynb"):
        mark_if_earlier(chapter, Path("notebooks") / chapter.name)
    write_data(Results.open(book / "results"), book)
    return build(book)


def _published_copy(run: Path, published: Path) -> Path:
    book = run / "book"
    for part in ("results", "chapters"):
        if not (published / part).exists():
            raise StudyError(
                f"{published / part} is missing: nothing has been published yet. `make study` builds a book of your own."
            )
        shutil.rmtree(book / part, ignore_errors=True)
        shutil.copytree(published / part, book / part)
    return book


def publish(profile: str, published: Path = PAGES, readme: Path = README) -> Path:
    """Add what a run has finished to the committed results and chapters in `published`; nothing is trained or timed.

    Results of other runs stay, so a study that took several machines or days comes together. Notebook 7 runs on all of them,
    and README gets their table. Without a run, what is there already is told again. Returns the first page of the book.
    """
    with TemporaryDirectory() as folder:  # what was published before stays as it was until the new book is built
        aside = Path(folder)
        for part in ("results", "chapters"):
            (aside / part).mkdir()
            if (published / part).exists():
                shutil.copytree(published / part, aside / part, dirs_exist_ok=True)
        if list((Path("runs") / profile / "records").glob("*.json")):
            collect(str(Path("runs") / profile), aside / "results", keep=True)
        for notebook in NOTEBOOKS:
            if notebook not in READERS and _is_finished(executed_notebook(notebook, profile)):
                copy_chapter(executed_notebook(notebook, profile), aside / "chapters" / f"{notebook}.ipynb")
        for notebook in READERS:
            run = Path("runs/published")
            _published_copy(run, aside)
            executed = run / "notebooks" / f"{notebook}.ipynb"
            executed.parent.mkdir(parents=True, exist_ok=True)
            source = f"notebooks/{notebook}.ipynb"
            papermill.execute_notebook(source, executed, {"run_dir": str(run)}, progress_bar=False)
            copy_chapter(executed, aside / "chapters" / f"{notebook}.ipynb")
        results = Results.open(aside / "results")
        if (figure := figures.carry_over(results)) is not None:
            figure.savefig(aside / "results" / "carry_over.png", dpi=110)
        table = _markdown(readme_table(results))
        page = published_book(published=aside)
        for part in ("results", "chapters"):
            shutil.rmtree(published / part, ignore_errors=True)
            shutil.copytree(aside / part, published / part)
    with whole_file(readme) as new:
        new.write_text(TABLE.sub(lambda mark: mark[1] + table + mark[2], readme.read_text()))
    return page


def _is_finished(executed: Path) -> bool:
    """Whether papermill ran this notebook to its end without an error."""
    if not executed.exists():
        return False
    papermill_says = read_notebook(executed).metadata.get("papermill", {})
    return bool(papermill_says.get("end_time")) and not papermill_says.get("exception")


def _command(arguments: Iterable[str]) -> Path:
    match [*arguments]:
        case ["run", name]:
            return book_of_run(name)
        case ["publish", name]:
            return publish(name)
        case ["published"]:
            return published_book()
        case other:
            raise StudyError(f"{other} is given; allowed are run PROFILE, publish PROFILE and published.")


if __name__ == "__main__":
    try:
        print(f"Open {_command(sys.argv[1:])}")
    except StudyError as error:
        sys.exit(f"book: {error}")
    except papermill.PapermillExecutionError as error:
        sys.exit(f"book: {str(error).strip().splitlines()[-1]}")
