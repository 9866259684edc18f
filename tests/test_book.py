import functools
import http.server
import shutil
import threading
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest
from conftest import ROOT

from helpers.files import StudyError
from helpers.report import claims
from helpers.study.book import EARLIER, README, is_of_today, mark_if_earlier, publish, published_book
from helpers.study.pipeline import NOTEBOOKS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason=f"no {'driver for Chromium' if CHROMIUM else 'Chromium'} here (Debian: apt-get install chromium chromium-driver)",
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def site(smoke):
    """The smoke book, served on this machine: (address, folder)."""
    folder = smoke / "book" / "_build" / "html"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def pages(folder):
    skipped = {"genindex.html", "search.html"}
    found = sorted(p.relative_to(folder) for p in folder.rglob("*.html") if "_static" not in p.parts)
    return [page for page in found if page.name not in skipped]


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_every_page_loads_with_its_pictures_without_errors_and_fits_the_screen(site, browser, width):
    address, folder = site
    assert len(pages(folder)) >= 12
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for page in pages(folder):
        browser.get(f"{address}/{page}")
        errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, (page, errors)
        broken = "return [...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(broken) == [], page
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width + 1, page
        cut = "return [...document.querySelectorAll('.cell_output pre')].filter(p => p.scrollWidth > p.clientWidth + 1).length"
        assert browser.execute_script(cut) == 0, page
        unnamed = "return [...document.querySelectorAll('.bd-article img')].filter(i => !i.alt).map(i => i.src)"
        assert browser.execute_script(unnamed) == [], page


@needs_browser
def test_no_link_inside_the_book_is_broken(site, browser):
    address, folder = site
    for page in pages(folder):
        browser.get(f"{address}/{page}")
        links = browser.execute_script(
            "return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
        )
        for link in links:
            target, anchor = urldefrag(urljoin(browser.current_url, link))
            if urlparse(target).netloc == urlparse(address).netloc:
                file = folder / unquote(urlparse(target).path).lstrip("/")
                file = file / "index.html" if file.is_dir() else file
                assert file.exists(), (page, link)
                if anchor and file.suffix == ".html":
                    assert f'id="{anchor}"' in file.read_text(), (page, link)


@needs_browser
def test_the_claims_page_says_which_findings_hold_here_and_where_each_comes_from(site, browser):
    browser.get(f"{site[0]}/claims.html")
    text = browser.find_element("css selector", ".bd-article").text
    assert "this run" in text and "not measured" in text and "holds" in text
    assert all(claim.sentence in text for claim in claims.CLAIMS)
    links = browser.find_elements("css selector", ".bd-article a[href*='chapters/06_benchmark']")
    assert links


def test_a_sentence_of_the_findings_leads_to_its_claim(site):
    page = (site[1] / "findings.html").read_text()
    assert 'href="claims.html#claim-' in page and "claim:" not in page


def test_chapters_carry_the_code_of_their_notebooks(smoke):
    for name in NOTEBOOKS:
        assert is_of_today(smoke / "book" / "chapters" / f"{name}.ipynb", ROOT / "notebooks" / f"{name}.ipynb"), name


def test_publishing_adds_a_run_keeps_the_others_and_leaves_all_as_it_was_if_the_book_cannot_be_built(
    tmp_path, monkeypatch
):
    committed, readme = tmp_path / "book", tmp_path / "README.md"
    readme.write_text("# Title\n<!-- table -->\nold\n<!-- end of table -->\nrest\n")
    for part in ("results", "chapters"):
        shutil.copytree(ROOT / "book" / part, committed / part)
    before = {path: path.read_bytes() for path in committed.rglob("*.csv")}
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("helpers.study.book.published_book", lambda **_: 1 / 0)
        publish("smoke", committed, readme)
    assert before == {path: path.read_bytes() for path in committed.rglob("*.csv")} and "old" in readme.read_text()


def test_the_published_book_builds_and_the_readme_has_its_table(tmp_path):
    page = published_book(tmp_path)
    assert "not measured" not in (tmp_path / "book" / "data" / "verdicts.md").read_text()
    table = (tmp_path / "book" / "data" / "readme.md").read_text()
    assert table in README.read_text()
    chapters = {path.stem for path in (ROOT / "book" / "chapters").glob("*.ipynb")}
    assert {"01_train", "07_analysis", "08_carry_over"} <= chapters <= set(NOTEBOOKS)
    for name in chapters:
        says_so = "Executed with an earlier version" in (page.parent / "chapters" / f"{name}.html").read_text()
        today = is_of_today(ROOT / "book" / "chapters" / f"{name}.ipynb", ROOT / "notebooks" / f"{name}.ipynb")
        assert says_so != today, name


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= 800


def test_a_chapter_of_other_code_says_so(tmp_path):
    cell = nbformat.v4
    injected = cell.new_code_cell("x = 2", metadata={"tags": ["injected-parameters"]})

    def notebook(path, title, *codes):
        cells = [cell.new_markdown_cell(title), *(cell.new_code_cell(code) for code in codes)]
        nbformat.write(cell.new_notebook(cells=[*cells, injected]), path)

    for code, expected in (("y = 1  # said otherwise", "# Was"), ("y = 3", f"# Was\n\n{EARLIER}")):
        notebook(tmp_path / "chapter.ipynb", "# Was", "x = 1", "y = 1")
        notebook(tmp_path / "today.ipynb", "# Is", "x = 1", code)
        mark_if_earlier(tmp_path / "chapter.ipynb", tmp_path / "today.ipynb")
        assert nbformat.read(tmp_path / "chapter.ipynb", as_version=4).cells[0].source == expected


def test_a_book_without_results_is_refused(tmp_path):
    with pytest.raises(StudyError, match="nothing has been published yet"):
        published_book(tmp_path / "run", tmp_path / "nowhere")
