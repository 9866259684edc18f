"""Write the repository's URL, which pyproject names once, into badges, setup cells, book and citation.

Command line: python -m helpers.study.repository https://github.com/OWNER/NAME
"""

import re
import sys
import tomllib
from pathlib import Path

from helpers.files import StudyError, whole_file


def repository_url(root: Path = Path(".")) -> str:
    """The URL in pyproject's [project.urls]."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def rewrite(url: str, root: Path = Path(".")) -> list[Path]:
    """Replace the repository's URL by `url` everywhere it stands; returns the files that changed.

    url: https://github.com/OWNER/NAME (Colab opens notebooks from GitHub only). Raises StudyError for another form.
    """
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise StudyError(f"URL is {url!r}; it must look like https://github.com/OWNER/NAME.")
    old = repository_url(root)
    host = "https://github.com/"
    swaps = [(old, url), ("github/" + old.removeprefix(host) + "/blob", "github/" + url.removeprefix(host) + "/blob")]
    changed = []
    for path in [
        root / "pyproject.toml",
        root / "README.md",
        root / "CITATION.cff",
        root / "book/_config.yml",
    ] + sorted([*(root / "notebooks").glob("*.ipynb"), *(root / "book/chapters").glob("*.ipynb")]):
        text = path.read_text()
        new = text
        for before, after in swaps:
            new = new.replace(before, after)
        if new != text:
            with whole_file(path) as aside:
                aside.write_text(new)
            changed.append(path)
    return changed


if __name__ == "__main__":
    try:
        for changed_file in rewrite(sys.argv[1] if len(sys.argv) > 1 else ""):
            print(changed_file)
    except StudyError as error:
        sys.exit(f"repository: {error}")
