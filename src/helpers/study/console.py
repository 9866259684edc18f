"""What `make study` shows: a line when a notebook starts and one when it ends; of one that failed, what it said last.

A logger plugin for Snakemake, which hands events to `LogHandler`; `helpers.study` registers it. Everything else that
Snakemake and the notebooks print is in the run's study.log, and what building the book prints in its book.log.
Source: https://github.com/snakemake/snakemake-interface-logger-plugins
"""

import os
import re
import time
from logging import LogRecord
from pathlib import Path
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from helpers.files import StudyError
from helpers.study.pipeline import NOTEBOOKS, SIZE_OF, Profile, load_profile, read_notebook

PROFILE = "STUDY_PROFILE"  # environment variable: the profile that runs
LAST_LINES = 15  # of a failed job, on the screen
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def minutes_of(rule: str, arch: str = "resnet18") -> float:
    """Minutes that a rule is expected to take on two cores, for one model; only ratios matter."""
    return NOTEBOOKS[rule].minutes * SIZE_OF[arch] if rule in NOTEBOOKS else 0.7


def mean_minutes(rule: str, profile: Profile) -> float:
    """The mean of `minutes_of` over the models that a rule runs for under a profile."""
    archs = [model.get("arch", "resnet18") for model in profile.planned(rule)] if rule in NOTEBOOKS else ["resnet18"]
    return sum(minutes_of(rule, arch) for arch in archs) / max(1, len(archs))


def last_lines(log: Path) -> list[str]:
    """What a job that failed said last: of an executed notebook, its failed cell; [] if none failed, or it is not whole."""
    if not log.exists():
        return []
    if log.suffix != ".ipynb":
        return log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    try:
        cells = read_notebook(log).cells
    except StudyError:  # papermill was stopped while it wrote, or the disk was full
        return []
    lines: list[str] = []
    for cell in cells:
        outputs = cell.get("outputs", [])
        if any(output.output_type == "error" for output in outputs):
            for output in outputs:
                text = "\n".join(output.traceback) if output.output_type == "error" else output.get("text", "")
                lines += COLOURS.sub("", text).splitlines()
    return lines[-LAST_LINES:]


class Progress:
    """How far a run is: jobs are counted, and what is left is estimated from how long the finished ones took."""

    def __init__(self, profile: Profile) -> None:
        """A run of a profile that begins now."""
        self.profile = profile
        self.started = time.monotonic()
        self.total = 0
        self.begun: dict[int, tuple[str, float, float]] = {}  # jobid -> name, expected minutes, when it started
        self.numbers: dict[int, int] = {}
        self.left = self.done = 0.0  # expected minutes

    def plan(self, jobs: dict[str, int]) -> None:
        """jobs: rule -> how many there are to do."""
        counted = {rule: count for rule, count in jobs.items() if rule not in ("all", "total")}
        self.total = sum(counted.values())
        self.left = sum(count * mean_minutes(rule, self.profile) for rule, count in counted.items())

    def start(self, job: int, rule: str, wildcards: dict[str, str]) -> str:
        """The line for a job that starts."""
        name = " ".join([rule, *(f"s{v}" if k == "seed" else v for k, v in wildcards.items())])
        self.begun[job] = name, minutes_of(rule, wildcards.get("arch", "resnet18")), time.monotonic()
        self.numbers.setdefault(job, len(self.numbers) + 1)
        return f"{self._number(job)}  {name} ..."

    def end(self, job: int) -> str:
        """The line for a job that ended well."""
        name, expected, since = self.begun.pop(job)
        self.done += expected
        self.left = max(0.0, self.left - expected)
        minutes = (time.monotonic() - since) / 60
        return f"{self._number(job)}  {name}: {minutes:.1f} min{self._time_left()}"

    def _number(self, job: int) -> str:
        return f"{self.numbers[job]:3d} of {self.total}"

    def _time_left(self) -> str:
        if self.left < 0.1:
            return ""
        left = self.left * (time.monotonic() - self.started) / 60 / self.done
        return f"; about {left:.0f} min left" if left >= 1.5 else "; about a minute left"


class LogHandler(LogHandlerBase):
    """Snakemake's events as lines of a person's console, on standard output."""

    def __post_init__(self) -> None:
        """Called once Snakemake has set the handler up."""
        self.progress = Progress(load_profile(os.environ[PROFILE]))
        self.failed = False

    def emit(self, record: LogRecord) -> None:
        """Print what an event is worth to a reader: most of them, nothing."""
        facts: dict[str, Any] = record.__dict__
        match facts.get("event"):
            case LogEvent.RUN_INFO:
                self.progress.plan({str(rule): int(count) for rule, count in facts["stats"].items()})
            case LogEvent.JOB_INFO if facts["rule_name"] != "all":
                wildcards = dict(facts["wildcards"] or {})
                self._say(self.progress.start(facts["jobid"], facts["rule_name"], wildcards))
            case LogEvent.JOB_FINISHED if facts["job_id"] in self.progress.begun:
                self._say(self.progress.end(facts["job_id"]))
            case LogEvent.JOB_ERROR:
                self._failed(facts["rule_name"], [Path(str(log)) for log in facts["log"]])
            case LogEvent.ERROR if facts.get("exception") == "RuleException":
                self.failed = True  # of a job, whose JOB_ERROR follows and says more
            case LogEvent.ERROR | None if record.levelname in ("ERROR", "CRITICAL") and not self.failed:
                self._say(record.getMessage())

    def _failed(self, rule: str, logs: list[Path]) -> None:
        self.failed = True
        self._say(f"FAILED  {rule}")
        for log in logs:
            for line in last_lines(log):
                self._say(f"        {line}")
            if log.suffix == ".ipynb" and log.exists():
                self._say(f"        The notebook, with its traceback: {log}")

    def _say(self, line: str) -> None:
        print(line, flush=True)

    @property
    def writes_to_stream(self) -> bool:
        """It replaces Snakemake's own console."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """No file of its own."""
        return False

    @property
    def has_filter(self) -> bool:
        """It decides by itself what to show."""
        return True

    @property
    def has_formatter(self) -> bool:
        """It formats by itself."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """It draws no graph."""
        return False
