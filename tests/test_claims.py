import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.report import claims
from helpers.report.results import Results

PUBLISHED = Path("book/results")
PAGES = [Path("README.md"), *sorted(Path("book").glob("*.md"))]
BY_ID = {claim.id: claim for claim in claims.CLAIMS}


@pytest.fixture(scope="module")
def published():
    return Results.open(PUBLISHED)


@pytest.fixture(scope="module")
def verdicts(published):
    return {claim.id: claim.check(published) for claim in claims.CLAIMS}


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PUBLISHED, tmp_path / "results"))


def cited():
    return [(page, sentence, ids) for page in PAGES for sentence, ids in claims.cited_in(page.read_text())]


def test_every_claim_that_a_page_cites_exists_and_holds_on_the_published_records(verdicts):
    for page, sentence, ids in cited():
        for id_ in ids:
            assert id_ in BY_ID, f"{page}: there is no claim {id_}"
            assert verdicts[id_].status == "holds", f"{page}: {id_} {verdicts[id_].status}: {sentence}"


def test_every_number_of_a_sentence_is_one_of_the_claim_that_it_cites(verdicts):
    said = [*cited(), *(("claims", claim.sentence, [claim.id]) for claim in claims.CLAIMS)]
    for page, sentence, ids in said:
        for number in claims.numbers_in(sentence):
            known = any(number in BY_ID[id_].numbers or verdicts[id_].knows(number) for id_ in ids)
            assert known, f"{page}: {number} is no value of {', '.join(ids)}: {sentence}"


def test_every_claim_is_cited():
    ids = {id_ for _, _, of in cited() for id_ in of}
    if not ids:
        pytest.skip("no page cites a claim")
    assert ids == {*BY_ID}


def test_no_claim_contradicts_the_published_records(verdicts):
    assert {id_: verdict.status for id_, verdict in verdicts.items() if verdict.status in ("fails", "undecided")} == {}


def test_openvino_three_times_as_slow_refutes_what_is_said_of_it(copy, published):
    path = copy / "latency.csv"
    latency = pd.read_csv(path, keep_default_na=False)
    slow = latency.runtime == "openvino"
    latency.loc[slow, ["median_ms", "p90_ms"]] *= 3
    latency.to_csv(path, index=False)
    spoiled = Results.open(copy)
    assert failing(spoiled) >= {"runtime-alone", "int8-total"}
    assert "ort-default-slow" not in failing(spoiled)


def test_one_time_changed_by_hand_refutes_a_claim(copy):
    path = copy / "latency.csv"
    latency = pd.read_csv(path, keep_default_na=False)
    row = (latency.run_id == "06_benchmark-resnet50-tuned-s0") & (latency.arm == "ptq_nncf")
    row &= (latency.threads == 2) & (latency.batch == 1)
    latency.loc[row, "median_ms"] *= 3
    latency.to_csv(path, index=False)
    assert failing(Results.open(copy)) == {"int8-total", "int8-adds"}


def test_answers_shuffled_refute_what_is_said_of_accuracy(copy):
    names = ["05_onnx_openvino-resnet50*", "11_dead_taps-resnet50*", "02_ptq-resnet50*"]
    for path in [path for name in names for path in (copy / "predictions").glob(f"{name}.npz")]:
        with np.load(path) as stored:
            arrays = {key: np.random.default_rng(0).permutation(array) for key, array in stored.items()}
        np.savez_compressed(path, **arrays)
    assert failing(Results.open(copy)) >= {"int8-cost", "robust-observers", "trimming-exact"}


def failing(results):
    return {claim.id for claim in claims.CLAIMS if claim.check(results).status == "fails"}


def test_a_claim_without_its_records_is_not_measured(copy):
    for table in ("latency", "diagnosis", "profile", "calibration", "size"):
        path = copy / f"{table}.csv"
        pd.read_csv(path, keep_default_na=False).head(0).to_csv(path, index=False)
    statuses = claims.check(Results.open(copy)).set_index("id").status
    assert {*statuses[["int8-total", "flips", "x86-engine", "more-images", "trimming-bytes"]]} == {"not measured"}
    assert statuses["collapse"] == "holds"


def test_a_sentence_and_its_numbers_are_found_beside_the_mark():
    text = (
        "Three ResNets (32x32). INT8 in OpenVINO is 8x, 14.1x and 12x faster than\nFP32 on ResNet18. <!-- claim: a -->\n\n"
        "- On `5` of 10,000 images [n = 7](page9.md). <!-- claim: b --> <!-- claim: c -->\n- No claim: 3."
    )
    first, second = claims.cited_in(text)
    assert first == ("INT8 in OpenVINO is 8x, 14.1x and 12x faster than FP32 on ResNet18.", ["a"])
    assert claims.numbers_in(first[0]) == ["8", "14.1", "12"]
    assert second[1] == ["b", "c"] and claims.numbers_in(second[0]) == ["10,000", "7"]


def test_a_value_is_known_as_rounded_where_it_is_typed():
    verdict = claims.Verdict((claims.Evidence("x", -14.114, 13.23, 14.43, "times", n=10_000),))
    assert all(verdict.knows(number) for number in ("14", "14.1", "14.11", "13.2", "10,000"))
    assert not any(verdict.knows(number) for number in ("15", "14.2", "3"))


def test_all_tables_figures_and_claims_are_made_without_torch():
    program = """
import inspect, sys
import matplotlib; matplotlib.use("agg")
from helpers.report import claims, figures, tables
from helpers.report.results import Results
results = Results.open("book/results")
for module in (tables, figures):
    for name, make in inspect.getmembers(module, inspect.isfunction):
        if make.__module__ == module.__name__ and "results" in inspect.signature(make).parameters and name[0] != "_":
            made = make(results, 1) if name == "reference" else make(results)
            assert made is not None or name == "carry_over", name
assert len(claims.check(results)) == len(claims.CLAIMS)
assert "torch" not in sys.modules, "torch"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
