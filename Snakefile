# The study as a DAG: data -> train -> ptq, qat -> exports -> benchmark -> analysis -> book. The rules are named after their notebooks.
# Every rule is one papermill command that also works when typed by hand. A record is a rule's output: it is written
# last and whole. Executed notebooks are logs, so that a failed one is kept with its traceback.
import json
import shlex
import sys
from pathlib import Path

from helpers.models import ARCHS
from helpers.parameters import LEFT_OUT, NEEDS, load_profile

NAME = config.get("profile", "quick")
PROFILE = load_profile(NAME)
RUN = f"runs/{NAME}"
FIRST = PROFILE.trained()[0]

# Which cell runs says little to who waits: papermill's lines about it are left out; what the cells print stays.
PAPERMILL = (
    f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar --log-output {{input.notebook}} {{log}} -y {{params}}"
    " 2> >(sed -u -E '/^(Executing|Ending) Cell|^$/d' >&2)"
)
RECORD = RUN + "/records/{notebook}-{{arch}}-{{recipe}}-s{{seed}}.json"
COLLAPSE = f"{RUN}/records/09_ptq_collapse-s{FIRST['seed']}.json"
EXECUTED = RUN + "/notebooks/{notebook}-{{arch}}-{{recipe}}-s{{seed}}.ipynb"

# Cores of one machine: here those that Snakemake was given; on a cluster, where it gets none, the configuration's `threads`.
CORES = workflow.cores or int(config.get("threads", 1))
# Models train side by side on one machine when there are several; at 32x32 pixels more than four threads do not help one.
threads_each = max(1, min(4, CORES // len(PROFILE.trained()) if workflow.cores else CORES))


def parameters(notebook):
    """The inline YAML of one papermill command (JSON is YAML)."""

    def of(wildcards):
        chosen = {"arch": wildcards.arch, "recipe": wildcards.recipe, "seed": int(wildcards.seed)}
        return shlex.quote(json.dumps(PROFILE.arguments(notebook, NAME, **chosen)))

    return of


def records(notebook, models):
    """Records of a notebook for these models."""
    return [RECORD.format(notebook=notebook).format(**model) for model in models]


localrules:
    all,


wildcard_constraints:
    arch="|".join(ARCHS),
    recipe="[a-z_]+",
    seed="[0-9]+",


rule all:
    input:
        f"{RUN}/book/_build/html/index.html",


# What is left out where PyTorch has no eager-mode INT8 is not needed either.
NEEDS = {
    notebook: [other for other in needed if other not in LEFT_OUT]
    for notebook, needed in NEEDS.items()
    if notebook not in LEFT_OUT
}
# The first three notebooks run for every model, the next two for those that are exported, the rest for one model of each
# arch or for the first model only: their question does not depend on seeds.
TRAINED, SERVED, TIMED = PROFILE.trained(), PROFILE.served(), PROFILE.timed()
PLANNED = {
    **dict.fromkeys(("01_train", "02_ptq", "03_qat"), TRAINED),
    **dict.fromkeys(("04_jit", "05_onnx_openvino"), SERVED),
    **dict.fromkeys(("06_benchmark", "11_dead_taps", "12_runtimes", "13_where_time_goes", "14_calibration"), TIMED),
    **dict.fromkeys(("10_jpeg_copy", "15_bit_widths", "16_what_accuracy_hides"), [FIRST]),
}
MODELS = {notebook: [model for model in models if PROFILE.runs(notebook, model)] for notebook, models in PLANNED.items()}
TRAINS = ("01_train", "03_qat", "12_runtimes", "15_bit_widths")
# These time exports and first calls on their way: they get every core, so that no training runs beside them.
CLOCKS = ("04_jit", "05_onnx_openvino", "11_dead_taps", "12_runtimes")
# What compares latencies waits until nothing else is left to do, and claims every core: it has the machine to itself.
ALONE = ("06_benchmark", "13_where_time_goes")
BEFORE = {notebook: needed for notebook, needed in NEEDS.items() if notebook not in ALONE}

for notebook, needed in BEFORE.items():

    rule:
        name:
            notebook
        input:
            [RECORD.format(notebook=other) for other in needed],
            notebook=f"notebooks/{notebook}.ipynb",
        output:
            update(RECORD.format(notebook=notebook)),
        log:
            EXECUTED.format(notebook=notebook),
        params:
            parameters(notebook),
        threads: CORES if notebook in CLOCKS else threads_each if notebook in TRAINS else 1
        resources:
            mem_mb=4000,
            gpu=config.get("gpu", 0) if notebook in TRAINS else 0,
        shell:
            PAPERMILL


# Four ResNet50s of its own, and the study's if it trains one.
OWN_RESNET50 = {"arch": "resnet50", "recipe": "tuned", "seed": FIRST["seed"]}


rule ptq_collapse:
    input:
        records("01_train", [OWN_RESNET50] if OWN_RESNET50 in TRAINED else []),
        notebook="notebooks/09_ptq_collapse.ipynb",
    output:
        update(COLLAPSE),
    log:
        f"{RUN}/notebooks/09_ptq_collapse-s{FIRST['seed']}.ipynb",
    params:
        shlex.quote(json.dumps(PROFILE.arguments("09_ptq_collapse", NAME, seed=FIRST["seed"]))),
    threads: threads_each
    resources:
        mem_mb=4000,
        gpu=config.get("gpu", 0),
    shell:
        PAPERMILL


for notebook in ALONE:

    rule:
        name:
            notebook
        input:
            [records(other, MODELS[other]) for other in BEFORE],
            [] if "09_ptq_collapse" in LEFT_OUT else [COLLAPSE],
            notebook=f"notebooks/{notebook}.ipynb",
        output:
            update(RECORD.format(notebook=notebook)),
        log:
            EXECUTED.format(notebook=notebook),
        params:
            parameters(notebook),
        threads: CORES
        resources:
            mem_mb=4000,
        shell:
            PAPERMILL


# These read the records of all others, and write pages of the book.
PAGES = {"07_analysis": "table1.md", "08_qat_or_longer": "qat.md", "17_decide": "choice.md"}
PAGES = {notebook: page for notebook, page in PAGES.items() if notebook not in LEFT_OUT}
for notebook, page in PAGES.items():

    rule:
        name:
            notebook
        input:
            [records(other, MODELS[other]) for other in ("06_benchmark", "13_where_time_goes")],
            [f"{RUN}/book/results/{PAGES['07_analysis']}"] if notebook != "07_analysis" else [],
            reference="book/reference_study.csv",
            notebook=f"notebooks/{notebook}.ipynb",
        output:
            update(f"{RUN}/book/results/{page}"),
        log:
            f"{RUN}/notebooks/{notebook}.ipynb",
        params:
            shlex.quote(json.dumps(PROFILE.arguments(notebook, NAME))),
        resources:
            mem_mb=4000,
        shell:
            PAPERMILL


rule book:
    input:
        [f"{RUN}/book/results/{page}" for page in PAGES.values()],
        sorted(str(page) for page in Path("book").glob("*.*")),
    output:
        update(f"{RUN}/book/_build/html/index.html"),
    shell:
        f"{shlex.quote(sys.executable)} -m helpers.book run {NAME}"
