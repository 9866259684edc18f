# The study as a DAG: data -> train -> ptq, qat -> jit, onnx_openvino -> benchmark -> analysis -> book.
# Every rule is one papermill command that also works when typed by hand. A record is a rule's output: it is written
# last and whole. Executed notebooks are logs, so that a failed one is kept with its traceback.
import json
import shlex
import sys
from pathlib import Path

from helpers.parameters import load_profile

NAME = config.get("profile", "quick")
PROFILE = load_profile(NAME)
RUN = f"runs/{NAME}"
FIRST = PROFILE.trained()[0]

PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar --log-output "
RECORD = RUN + "/records/{notebook}-{{arch}}-{{recipe}}-s{{seed}}.json"
COLLAPSE = f"{RUN}/records/09_ptq_collapse-s{FIRST['seed']}.json"
EXECUTED = RUN + "/notebooks/{notebook}-{{arch}}-{{recipe}}-s{{seed}}.ipynb"

# Cores of one machine: here those that Snakemake was given; on a cluster, where it gets none, the configuration's `threads`.
CORES = workflow.cores or int(config.get("threads", 1))
# Models train side by side when there are several, and at 32x32 pixels more than four threads do not help one.
threads_each = max(1, min(4, CORES // len(PROFILE.trained())))


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
    arch="resnet[0-9]+",
    recipe="[a-z_]+",
    seed="[0-9]+",


rule all:
    input:
        f"{RUN}/book/_build/html/index.html",


rule train:
    input:
        notebook="notebooks/01_train.ipynb",
    output:
        update(RECORD.format(notebook="01_train")),
    log:
        EXECUTED.format(notebook="01_train"),
    params:
        parameters("01_train"),
    threads: threads_each
    resources:
        mem_mb=4000,
        gpu=config.get("gpu", 0),
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule ptq:
    input:
        rules.train.output,
        notebook="notebooks/02_ptq.ipynb",
    output:
        update(RECORD.format(notebook="02_ptq")),
    log:
        EXECUTED.format(notebook="02_ptq"),
    params:
        parameters("02_ptq"),
    threads: 1
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule qat:
    input:
        rules.train.output,
        notebook="notebooks/03_qat.ipynb",
    output:
        update(RECORD.format(notebook="03_qat")),
    log:
        EXECUTED.format(notebook="03_qat"),
    params:
        parameters("03_qat"),
    threads: threads_each
    resources:
        mem_mb=4000,
        gpu=config.get("gpu", 0),
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule jpeg_copy:
    input:
        rules.ptq.output,
        notebook="notebooks/10_jpeg_copy.ipynb",
    output:
        update(RECORD.format(notebook="10_jpeg_copy")),
    log:
        EXECUTED.format(notebook="10_jpeg_copy"),
    params:
        parameters("10_jpeg_copy"),
    threads: 1
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule jit:
    input:
        rules.ptq.output,
        rules.qat.output,
        notebook="notebooks/04_jit.ipynb",
    output:
        update(RECORD.format(notebook="04_jit")),
    log:
        EXECUTED.format(notebook="04_jit"),
    params:
        parameters("04_jit"),
    threads: 1
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule onnx_openvino:
    input:
        rules.ptq.output,
        rules.qat.output,
        notebook="notebooks/05_onnx_openvino.ipynb",
    output:
        update(RECORD.format(notebook="05_onnx_openvino")),
    log:
        EXECUTED.format(notebook="05_onnx_openvino"),
    params:
        parameters("05_onnx_openvino"),
    threads: 1
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


# Four ResNet50s of its own: it needs no other notebook.
rule ptq_collapse:
    input:
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
        PAPERMILL + "{input.notebook} {log} -y {params}"


# The benchmark waits until nothing else is left to do, and claims every core: it has the machine to itself.
rule benchmark:
    input:
        *(records(notebook, PROFILE.trained()) for notebook in ("01_train", "02_ptq", "03_qat")),
        *(records(notebook, PROFILE.served()) for notebook in ("04_jit", "05_onnx_openvino")),
        records("10_jpeg_copy", [FIRST]),
        COLLAPSE,
        notebook="notebooks/06_benchmark.ipynb",
    output:
        update(RECORD.format(notebook="06_benchmark")),
    log:
        EXECUTED.format(notebook="06_benchmark"),
    params:
        parameters("06_benchmark"),
    threads: CORES
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule analysis:
    input:
        records("06_benchmark", PROFILE.timed()),
        reference="book/reference_study.csv",
        notebook="notebooks/07_analysis.ipynb",
    output:
        update(f"{RUN}/book/results/headline.md"),
    log:
        f"{RUN}/notebooks/07_analysis.ipynb",
    params:
        shlex.quote(json.dumps(PROFILE.arguments("07_analysis", NAME))),
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule qat_or_longer:
    input:
        rules.analysis.output,
        notebook="notebooks/08_qat_or_longer.ipynb",
    output:
        update(f"{RUN}/book/results/qat.md"),
    log:
        f"{RUN}/notebooks/08_qat_or_longer.ipynb",
    params:
        shlex.quote(json.dumps(PROFILE.arguments("08_qat_or_longer", NAME))),
    resources:
        mem_mb=4000,
    shell:
        PAPERMILL + "{input.notebook} {log} -y {params}"


rule book:
    input:
        rules.qat_or_longer.output,
        sorted(str(page) for page in Path("book").glob("*.*")),
    output:
        update(f"{RUN}/book/_build/html/index.html"),
    shell:
        f"{shlex.quote(sys.executable)} -m helpers.book run {NAME}"
