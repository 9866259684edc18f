import functools
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, papermill, run

from helpers.files import StudyError
from helpers.quantize.arms import ENGINES
from helpers.quantize.settings import SETTINGS
from helpers.report import claims
from helpers.report.records import read_record, record_rows, write_record
from helpers.report.results import Results
from helpers.serve.runtimes import RUNTIMES
from helpers.study import canary
from helpers.study.book import EARLIER, README, copy_chapter, is_of_today, mark_if_earlier, publish, published_book
from helpers.study.pipeline import NOTEBOOKS, collect, ensure, load_profile
from helpers.study.repository import repository_url, rewrite
from helpers.train import published

# One file, with the fixtures, because its tests share the run directory of the small study: a file stays in one process.

SOURCES = {name: nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in NOTEBOOKS}


@pytest.fixture(scope="module")
def smoke(request):
    """The study in small, from nothing: its run directory, which has the profile's name."""
    profile = request.config.getoption("--study")
    folder = ROOT / "runs" / profile
    shutil.rmtree(folder, ignore_errors=True)
    done = run(sys.executable, "-m", "helpers.study.run", profile, "--max-threads", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.splitlines()[-1].endswith("index.html")
    (folder / "console.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def smoke_full(smoke):
    """The same with the experiments, for the tests that need them."""
    if smoke.name != "smoke_full":
        pytest.skip("the experiments run with: make test STUDY=smoke_full")
    return smoke


def cells(name, tag):
    return [cell for cell in SOURCES[name].cells if tag in cell.metadata.get("tags", [])]


def test_notebooks_are_the_numbered_ones_and_carry_no_outputs():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(NOTEBOOKS)
    for name, notebook in SOURCES.items():
        for cell in notebook.cells:
            assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None), name


def test_every_notebook_has_the_same_setup_one_parameters_cell_and_a_badge_of_its_own():
    url = repository_url(ROOT)
    assert len({cells(name, "setup")[0].source for name in NOTEBOOKS}) == 1
    assert url in cells("01_train", "setup")[0].source
    for name in NOTEBOOKS:
        assert len(cells(name, "parameters")) == 1, name
        for line in cells(name, "parameters")[0].source.splitlines():
            assert re.fullmatch(r"\w+: (int|str|list|bool|float) = .+  # .+", line), (name, line)
        owner = url.removeprefix("https://github.com/")
        assert (
            f"colab.research.google.com/github/{owner}/blob/main/notebooks/{name}.ipynb"
            in SOURCES[name].cells[0].source
        )


def test_the_study_runs_and_its_tables_are_complete(smoke):
    tables = Results.open(smoke / "book" / "results").tables
    accuracy, latency = tables["accuracy"], tables["latency"]
    explained = set(re.findall(r"`(\w+)`", (ROOT / "book" / "methods.md").read_text()))
    assert {"fp32", "ptq", "qat", *accuracy.arm} <= explained and {*accuracy.runtime} <= explained
    assert {("fp32", runtime) for runtime in WALKED} <= rows_of(accuracy)
    trained = latency[latency.recipe != "random"]
    assert set(trained.engine) == {"", *ENGINES}
    assert rows_of(trained, "engine") <= rows_of(accuracy, "engine")
    assert (latency[(latency.arm == "fp32") & (latency.runtime == "eager")].speedup == 1).all()
    assert accuracy.ci_low.le(accuracy.accuracy).all() and accuracy.ci_high.ge(accuracy.accuracy).all()
    assert (accuracy.correct / accuracy.n == accuracy.accuracy).all()


def test_the_experiments_run_and_their_tables_are_complete(smoke_full):
    tables = Results.open(smoke_full / "book" / "results").tables
    exports = tables["exports"]
    refused = rows_of(exports[exports.reason != ""])
    wanted = {("fp32", runtime) for runtime in RUNTIMES} | {
        ("ptq_longer_trimmed", "openvino"),
        ("qat_nncf", "openvino"),
    }
    wanted |= {(f"{how}_pt2e", runtime) for how in ("ptq", "qat") for runtime in PT2E_RUNTIMES}
    assert wanted - refused <= rows_of(tables["accuracy"])
    assert {row for row in refused if not _may_be_refused(*row)} == set()
    assert set(tables["latency"].pace) >= {"hot", "idle_10"}
    assert set(tables["load"].pace) == {"hot", "idle_10", "load_50"}
    pilots = {"pilot", "pilot, epoch 1", "pilot test, trains, low", "pilot test, keeps, low"}
    assert {*tables["diagnosis"].check} >= pilots


def test_the_record_of_settings_has_every_one_with_its_answers_or_its_reason(smoke_full):
    rows = record_rows(str(smoke_full), "19_settings-resnet18-tuned-s0", "yours")
    of = {row["arm"]: row for row in rows}
    assert {setting.name for setting in SETTINGS if setting.tool != "pt2e"} <= set(of)
    assert all((row["top1"] is None) == bool(row["reason"]) for row in rows)
    assert of["ort default"]["int8_layers"] < of["ort U8"]["int8_layers"] == of["nncf default"]["int8_layers"] == 1
    timed = record_rows(str(smoke_full), "19_settings-resnet18-tuned-s0", "yours_latency")
    assert {row["arm"] for row in timed} == {row["arm"] for row in rows if not row["reason"]}


WALKED = ("eager", "torchscript", "onnxruntime", "openvino")


def rows_of(table, *more):
    """The rows of a table of results, as tuples of arm, runtime and `more`."""
    return set(table[["arm", "runtime", *more]].itertuples(index=False, name=None))


def planned(smoke):
    """The notebooks of its profile."""
    return [name for name in NOTEBOOKS if load_profile(smoke.name).planned(name)]


def test_a_study_shows_a_line_a_notebook_its_headline_and_which_findings_hold(smoke):
    """Of the smoke study's first call: everything else it printed is in its log."""
    console = (smoke / "console.txt").read_text()
    shown = [name for name in NOTEBOOKS if re.search(rf"of \d+  {name}.*: [\d.]+ min", console)]
    assert shown == planned(smoke)
    assert "epoch 1/1: loss" in console and len(console.splitlines()) < 100
    assert "OpenVINO: INT8 (NNCF)" in console and "Published findings here:" in console
    assert "jobid" not in console and "Executing notebook" in (smoke / "study.log").read_text()


def test_a_finished_study_leaves_no_float_exports_and_they_are_made_again_with_the_same_settings(smoke, tmp_path):
    assert not [*(smoke / "weights").glob("*-fp32.pt")] and [*(smoke / "weights").glob("*-ptq.pt")]
    for part in ("records", "weights"):
        shutil.copytree(smoke / part, tmp_path / part)
    record = tmp_path / "records" / "04_jit-resnet18-tuned-s0.json"
    ensure(record, "04_jit", {"run_dir": str(tmp_path), "limit": 128})
    assert (tmp_path / "weights" / "resnet18-tuned-s0-fp32.pt").exists()


def test_a_notebook_starts_from_the_published_model_of_a_finished_run_and_nothing_is_trained(smoke, tmp_path):
    path, stored = published.publish(str(smoke), "resnet18", "tuned", 0, tmp_path / "resnet18.safetensors")
    values = {"run_dir": tmp_path / "run", "limit": 128, "start_from": path, "calibration_images": 32}
    arguments = [part for name, value in values.items() for part in ("-p", name, value)]
    done = papermill("02_ptq", tmp_path / "out.ipynb", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "records" / "01_train-resnet18-tuned-s0.json").read_text())
    weights = record["run"]["parameters"]["weights"]
    assert weights["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and weights["epochs"] == 1
    assert record["tables"]["training"] == []
    assert record["tables"]["accuracy"][0]["correct"] == stored.correct
    assert {*Results.open(collected(tmp_path / "run")).tables["accuracy"].arm} == {"fp32", "ptq", "ptq_default"}


def collected(run_dir):
    collect(str(run_dir), run_dir / "results")
    return run_dir / "results"


def test_the_canary_finds_a_run_the_same_as_itself_and_tells_what_is_spoiled_in_a_copy(smoke, tmp_path):
    assert {*canary.compare(smoke, smoke).status} == {"same"}
    spoiled = tmp_path / "spoiled"
    for part in ("records", "notebooks"):
        shutil.copytree(smoke / part, spoiled / part)
    (spoiled / "records" / "04_jit-resnet18-tuned-s0.json").unlink()
    record = spoiled / "records" / "05_onnx_openvino-resnet18-tuned-s0.json"
    as_float = json.dumps(read_record(record)).replace("convolution, int8", "convolution, float32")
    write_record(record, json.loads(as_float))
    arrays = record.with_suffix(".npz")
    with np.load(arrays) as kept:
        np.savez(arrays, **dict(kept) | {"fp32-openvino": (kept["fp32-openvino"] + 1) % 10})
    found = canary.compare(smoke, spoiled).set_index(["model", "path"])
    assert found.status["ResNet18", "OpenVINO: FP32"] == "answers changed"
    assert found.status["ResNet18", "OpenVINO: INT8 (NNCF)"] == "left INT8"
    died = found[found.status == "died"]
    assert {*died.reason} == {"04_jit-resnet18-tuned-s0 was not run"}
    assert ("ResNet18", "TorchScript: FP32") in died.index  # still timed by notebook 6, but not scored any more


PT2E_RUNTIMES = ("inductor", "aotinductor", "onnxruntime", "openvino")


def _may_be_refused(arm, runtime):
    """Whether a row has a reason to be missing on some machine."""
    compiled = runtime in ("inductor", "aotinductor") or arm == "qat_nncf"
    return (
        (arm, runtime) in (("ptq", "inductor"), ("fp32", "openvino_bf16"))
        or (compiled and not shutil.which("g++"))
        or (arm == "qat_nncf" and torch.cuda.is_available())
    )


def test_a_second_study_finds_everything_done(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "records").iterdir()}
    done = run(sys.executable, "-m", "helpers.study.run", smoke.name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {path: path.stat().st_mtime_ns for path in (smoke / "records").iterdir()}


def test_two_studies_in_one_run_directory_are_refused(smoke):
    from filelock import FileLock

    with FileLock(smoke / ".lock"):
        done = run(sys.executable, "-m", "helpers.study.run", smoke.name)
    assert done.returncode != 0 and "Another study is running" in done.stderr and "Traceback" not in done.stderr


def test_missing_data_ends_the_study_before_it_starts(tmp_path):
    done = run(sys.executable, "-m", "helpers.study.run", "cifar10", CIFAR10_ROOT=tmp_path)
    assert done.returncode != 0 and "(3) leave both unset" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_parameter_ends_in_one_sentence_and_no_work(tmp_path):
    given = ("-p", "run_dir", tmp_path / "run", "-p", "epochs", "ten")
    done = papermill("01_train", tmp_path / "out.ipynb", *given)
    assert done.returncode != 0
    assert "epochs is 'ten'" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_failed_run_leaves_the_earlier_record(smoke, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(smoke / "records", run_dir / "records")
    shutil.copytree(smoke / "weights", run_dir / "weights")
    (run_dir / "weights" / "resnet18-tuned-s0-fp32.safetensors").write_bytes(b"damaged")
    record = run_dir / "records" / "02_ptq-resnet18-tuned-s0.json"
    before = record.read_bytes()
    done = papermill("02_ptq", tmp_path / "out.ipynb", "-p", "run_dir", run_dir, "-p", "limit", "128")
    assert done.returncode != 0 and "not a whole safetensors file" in done.stderr
    assert record.read_bytes() == before


def test_the_cluster_path_of_snakemake_runs_the_same_file(smoke):
    gathered = smoke / "book" / "results" / "runs.json"
    before = gathered.stat().st_mtime_ns
    command = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", "bash", "--jobs", "1", "--cores", "1"]
    done = run(
        *(sys.executable, "-m", "snakemake", *command, "--nolock", "--latency-wait", "2", "--forcerun", "07_analysis"),
        *("--until", "07_analysis", "--config", f"profile={smoke.name}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert gathered.stat().st_mtime_ns > before


def test_environment_yml_gives_the_versions_of_constraints():
    import tomllib

    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{','.join(project['optional-dependencies'])}]"]
    assert "python=3.11" in environment["dependencies"] and project["requires-python"] == ">=3.11"
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    assert {re.split(r"[><=\[]", name)[0].lower() for name in asked} <= pinned


def test_a_fork_s_url_reaches_every_place(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    old = repository_url(tmp_path).removeprefix("https://github.com/")
    rewrite("https://github.com/someone/fork", tmp_path)
    assert repository_url(tmp_path) == "https://github.com/someone/fork"
    left = [
        name
        for name in tracked
        if not name.startswith("tests/") and old in (tmp_path / name).read_text(errors="ignore")
    ]
    assert left == []
    json.loads((tmp_path / "notebooks" / "01_train.ipynb").read_text())


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
    text = browser.find_element("css selector", ".bd-article").text.replace("\u2019", "'")  # Sphinx's apostrophes
    assert "this run" in text and "not measured" in text and "holds" in text
    assert all(claim.sentence in text for claim in claims.CLAIMS)
    links = browser.find_elements("css selector", ".bd-article a[href*='chapters/06_benchmark']")
    assert links


def test_a_sentence_of_the_findings_leads_to_its_claim(site):
    page = (site[1] / "findings.html").read_text()
    assert 'href="claims.html#claim-' in page and "claim:" not in page


def test_chapters_carry_the_code_of_their_notebooks(smoke):
    for name in planned(smoke):
        assert is_of_today(smoke / "book" / "chapters" / f"{name}.ipynb", ROOT / "notebooks" / f"{name}.ipynb"), name


def test_publishing_adds_a_run_keeps_the_others_and_leaves_all_as_it_was_if_the_book_cannot_be_built(
    smoke, tmp_path, monkeypatch
):
    """Published before are the same results, of a model of another seed."""
    committed, readme = tmp_path / "book", tmp_path / "README.md"
    readme.write_text("# Title\n<!-- table -->\nold\n<!-- end of table -->\nrest\n")
    for part in ("results", "chapters"):
        shutil.copytree(smoke / "book" / part, committed / part)
    for file in committed.glob("results/*.*"):
        file.write_text(file.read_text().replace("-s0", "-s7"))
    before = {path: path.read_bytes() for path in committed.rglob("*.*")}
    monkeypatch.setattr("helpers.study.book.READERS", ())  # another test runs notebook 7
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("helpers.study.book.published_book", lambda **_: 1 / 0)
        publish(smoke.name, committed, readme)
    assert before == {path: path.read_bytes() for path in committed.rglob("*.*")} and "old" in readme.read_text()
    monkeypatch.setattr("helpers.study.book.published_book", lambda **_: None)
    publish(smoke.name, committed, readme)
    runs = Results.open(committed / "results").runs
    assert {"01_train-resnet18-tuned-s0", "01_train-resnet18-tuned-s7"} <= runs.keys()
    assert "old" not in readme.read_text() and readme.read_text().endswith("rest\n")


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


def test_a_chapter_shows_results_and_no_progress_bars(tmp_path):
    new = nbformat.v4
    bars = [
        new.new_output("stream", name="stderr", text="\rresnet18:  50%|#####     | 1/2 [00:01<00:01,  1.00it/s]"),
        new.new_output("display_data", {"text/html": "<pre style='white-space:pre'></pre>\n", "text/plain": ""}),
        new.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}),
    ]
    result = new.new_output("stream", name="stdout", text="100 images")
    cell = new.new_code_cell("run()", outputs=[*bars, result])
    nbformat.write(new.new_notebook(cells=[cell]), tmp_path / "executed.ipynb")
    copy_chapter(tmp_path / "executed.ipynb", tmp_path / "chapter.ipynb")
    assert nbformat.read(tmp_path / "chapter.ipynb", as_version=4).cells[0].outputs == [result]


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
