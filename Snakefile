# The study as a DAG: data -> train -> ptq, qat -> exports -> benchmark -> analysis -> book. The rules are named after their notebooks.
# Every rule is one papermill command that also works when typed by hand. A record is a rule's output: it is written
# last and whole. Executed notebooks are logs, so that a failed one is kept with its traceback.
import json
import shlex
import sys
from pathlib import Path

from helpers.train.models import ARCHS
from helpers.study.pipeline import NOTEBOOKS, WITH_PARENT, load_profile
from helpers.report.schema import run_name

NAME = config.get("profile", "quick")
PROFILE = load_profile(NAME)
RUN = f"runs/{NAME}"

# Cores of one machine: here those that Snakemake was given; on a cluster, where it gets none, the configuration's `threads`.
CORES = workflow.cores or int(config.get("threads", 1))
# Models train side by side on one machine when there are several; at 32x32 pixels more than four threads do not help one.
threads_each = max(1, min(4, CORES // len(PROFILE.trained()) if workflow.cores else CORES))

PYTHON = shlex.quote(sys.executable)
# What the notebooks print goes into one log; the console says what starts and what ends, see helpers.study.console.
LOGGED = f" >> {RUN}/study.log 2>&1"
WITH_THE_STUDY = " ".join(["exec", *WITH_PARENT, PYTHON])
PAPERMILL = f"{WITH_THE_STUDY} -m papermill --no-progress-bar --log-output {{input.notebook}} {{log}} -y {{params}}" + LOGGED
MODEL = "-{arch}-{recipe}-s{seed}"
FIRST = PROFILE.trained()[0]
# What notebooks make that run once for all models: a record, and 7 gathers all of them.
ONCE = {
    notebook: f"{RUN}/records/{PROFILE.run_id(notebook)}.json"
    for notebook, facts in NOTEBOOKS.items()
    if facts.models == "none"
}
ONCE["07_analysis"] = f"{RUN}/book/results/runs.json"
OWN_RESNET50S = [of for of in PROFILE.trained() if (of["arch"], of["seed"]) == ("resnet50", FIRST["seed"])]


def records(notebook, models):
    """Records of a notebook for these models."""
    return [f"{RUN}/records/{run_name(notebook, **model)}.json" for model in models]


def outputs(notebook):
    """What a notebook has made when it has run for all its models."""
    return [ONCE[notebook]] if notebook in ONCE else records(notebook, PROFILE.planned(notebook))


def parameters(notebook):
    """The inline YAML of one papermill command (JSON is YAML)."""

    def of(wildcards):
        chosen = {key: int(value) if key == "seed" else value for key, value in wildcards.items()}
        return shlex.quote(json.dumps(PROFILE.arguments(notebook, NAME, **chosen)))

    return of


def threads_of(notebook):
    """Every core for what times something, a share of them for what trains, one for the rest."""
    runs = NOTEBOOKS[notebook]
    if runs.alone or (runs.clocks and PROFILE.common.get("first_calls", True)):
        return CORES
    return threads_each if runs.trains else 1


PLANNED = [notebook for notebook in NOTEBOOKS if PROFILE.planned(notebook)]
OF_MODELS = [notebook for notebook in PLANNED if NOTEBOOKS[notebook].models != "none"]
BEFORE_TIMING = [n for n in PLANNED if not NOTEBOOKS[n].alone and not NOTEBOOKS[n].reads]
MAKE_RECORDS = [notebook for notebook in PLANNED if not NOTEBOOKS[notebook].reads]


localrules:
    all,


wildcard_constraints:
    arch="|".join(ARCHS),
    recipe="[a-z_]+",
    seed="[0-9]+",


rule all:
    input:
        f"{RUN}/book/_build/html/index.html",


for notebook in OF_MODELS:

    rule:
        name:
            notebook
        input:
            # What compares latencies waits until nothing else is left to do.
            [outputs(other) for other in BEFORE_TIMING]
            if NOTEBOOKS[notebook].alone
            else [f"{RUN}/records/{other}{MODEL}.json" for other in NOTEBOOKS[notebook].needs if other in PLANNED],
            notebook=f"notebooks/{notebook}.ipynb",
        output:
            update(f"{RUN}/records/{notebook}{MODEL}.json"),
        log:
            f"{RUN}/notebooks/{notebook}{MODEL}.ipynb",
        params:
            parameters(notebook),
        threads: threads_of(notebook)
        resources:
            mem_mb=4000,
            gpu=config.get("gpu", 0) if NOTEBOOKS[notebook].trains else 0,
        shell:
            PAPERMILL


for notebook in [notebook for notebook in PLANNED if notebook in ONCE]:

    rule:
        name:
            notebook
        input:
            [records("01_train", OWN_RESNET50S), *(outputs(other) for other in NOTEBOOKS[notebook].needs)]
            if NOTEBOOKS[notebook].trains
            else [outputs(other) for other in (MAKE_RECORDS if NOTEBOOKS[notebook].reads else BEFORE_TIMING)],
            "book/reference_study.csv" if NOTEBOOKS[notebook].reads else [],
            notebook=f"notebooks/{notebook}.ipynb",
        output:
            update(ONCE[notebook]),
        log:
            f"{RUN}/notebooks/{PROFILE.run_id(notebook)}.ipynb",
        params:
            shlex.quote(json.dumps(PROFILE.arguments(notebook, NAME, seed=FIRST["seed"]))),
        threads: threads_of(notebook)
        resources:
            mem_mb=4000,
            gpu=config.get("gpu", 0) if NOTEBOOKS[notebook].trains else 0,
        shell:
            PAPERMILL


rule book:
    input:
        outputs("07_analysis"),
        sorted(str(page) for page in Path("book").glob("*.*")),
    output:
        update(f"{RUN}/book/_build/html/index.html"),
    log:
        f"{RUN}/book.log",
    shell:
        f"{WITH_THE_STUDY} -m helpers.study.book run {NAME} > {{log}} 2>&1"
