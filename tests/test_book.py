import ast
import functools
import http.server
import shutil
import threading
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from helpers.book import EARLIER, NOT_DONE, publish, published_book, renew_text, whats_found
from helpers.pipeline import NOTEBOOKS, READERS
from helpers.records import read_results

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
def test_the_first_page_shows_what_was_found(site, browser):
    browser.get(f"{site[0]}/intro.html")
    text = browser.find_element("css selector", ".bd-article").text
    assert (
        "ResNet18" in text
        and "times as fast as eager FP32" in text
        and "none can be recommended" in text
        and "95 %" in text
        and NOT_DONE not in text
    )
    assert len(browser.find_elements("css selector", ".bd-article table")) == 5


def test_chapters_carry_the_code_of_their_notebooks(smoke):
    for name in NOTEBOOKS:
        assert code_of(smoke / "book" / "chapters" / f"{name}.ipynb") == code_of(
            ROOT / "notebooks" / f"{name}.ipynb"
        ), name


def test_a_published_book_keeps_other_runs_and_takes_every_run_once(smoke, tmp_path, monkeypatch):
    committed, readme = tmp_path / "committed", tmp_path / "README.md"
    readme.write_text("# Title\n<!-- found -->the text before<!-- end of found -->\nrest\n")
    publish("smoke", committed, readme)
    text = readme.read_text()
    assert (
        "times as fast" in text
        and "ResNet18, fastest, not shown to qualify: `" in text  # of few images
        and text.index("Which one to take?") < text.index("Does QAT beat FP32?") < text.index("| row")
        and "the text before" not in text
        and text.endswith("rest\n")
    )
    once = read_results(committed / "results")
    foreign = once["training"].assign(run_id="01_train-resnet34-tuned-s0", arch="resnet34")
    path = committed / "results" / "training.csv"
    pd.concat([foreign, once["training"]]).to_csv(path, index=False)
    before = path.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("helpers.book.published_book", lambda **_: 1 / 0)
        publish("smoke", committed, readme)
    assert path.read_bytes() == before  # a book that cannot be built leaves what was published
    page = publish("smoke", committed, readme)
    twice = read_results(committed / "results")
    assert all(twice[table].equals(once[table]) for table in once if table != "training")
    assert len(twice["training"]) == 2 * len(once["training"]) and set(twice["training"].arch) == {
        "resnet18",
        "resnet34",
    }
    assert "times as fast as eager FP32" in page.with_name("intro.html").read_text()
    (committed / "chapters" / "15_bit_widths.ipynb").unlink()
    (committed / "results" / "bit_widths.md").unlink()
    page = published_book(tmp_path / "run", committed)
    for name in ("beyond.html", "chapters/15_bit_widths.html"):
        assert NOT_DONE in (page.parent / name).read_text()


@pytest.mark.skipif(not (ROOT / "book" / "results").exists(), reason="nothing has been published yet")
def test_the_published_book_builds_and_the_readme_and_every_chapter_say_what_is_so(tmp_path):
    page = published_book(tmp_path)
    assert whats_found(page.parents[2] / "results") in (ROOT / "README.md").read_text()
    assert (ROOT / "book" / "results" / "overview.png").exists()
    chapters = [path.stem for path in (ROOT / "book" / "chapters").glob("*.ipynb")]
    assert chapters and set(chapters) <= set(NOTEBOOKS) - set(READERS)
    for name in chapters:
        says_so = EARLIER.split(",")[0] in (page.parent / "chapters" / f"{name}.html").read_text()
        today = code_of(ROOT / "notebooks" / f"{name}.ipynb")
        current = syntax_of(code_of(ROOT / "book" / "chapters" / f"{name}.ipynb")) == syntax_of(today)
        assert says_so != current, name
        assert says_so or code_of(page.parents[2] / "chapters" / f"{name}.ipynb") == today, name


def syntax_of(cells):
    return [ast.dump(ast.parse(cell)) for cell in cells]  # without comments


def code_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return [
        c.source
        for c in cells
        if c.cell_type == "code" and not {"setup", "injected-parameters"} & set(c.metadata.get("tags", []))
    ]


def test_a_chapter_has_the_text_of_today_or_says_where_its_code_is_another(tmp_path):
    cell = nbformat.v4
    injected = cell.new_code_cell("x = 2", metadata={"tags": ["injected-parameters"]})

    def notebook(title, *codes):
        cells = [cell.new_markdown_cell(title)]
        for number, code in enumerate(codes):
            cells += [cell.new_markdown_cell(f"## Part {number}"), cell.new_code_cell(code)]
        return cells

    for code, expected in (
        ("y = 1  # said otherwise", "# Is"),
        ("y = 3", f'# Was\n\n:::{{note}}\n{EARLIER}"Part 1".\n:::'),
    ):
        executed = cell.new_notebook(cells=[*notebook("# Was", "x = 1", "y = 1"), injected])
        nbformat.write(executed, tmp_path / "chapter.ipynb")
        nbformat.write(cell.new_notebook(cells=notebook("# Is", "x = 1", code)), tmp_path / "today.ipynb")
        renew_text(tmp_path / "chapter.ipynb", tmp_path / "today.ipynb")
        found = nbformat.read(tmp_path / "chapter.ipynb", as_version=4).cells
        assert found[0].source == expected and len(found) == len(executed.cells)
