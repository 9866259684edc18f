"""A model under load: served by fresh processes of its own, called one after the other, after rests, or by arrivals that do not wait.

A process holds one runtime and one model, so its resident memory is theirs. `python -m helpers.serve.load` is such a process:
it reads a service and then what to measure, one JSON a line, and answers each with one JSON. Client and server share it,
so there is no network in these times. What the generator itself takes is what a model that does nothing takes (`NOTHING`).
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import psutil

from helpers.files import StudyError
from helpers.machine import usable_cores
from helpers.report.schema import COLUMNS, ENOUGH, prediction_key

NOTHING = "nothing"  # the runtime of a model that does nothing
SERVED = tuple(
    prediction_key(*row)
    for row in (("fp32", "eager"), ("fp32", "onnxruntime"), ("fp32", "openvino"), ("ptq_nncf", "openvino"))
)
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")  # whose settings a service does not inherit
WARM_S = 0.2  # seconds of calls before anything is measured
Call = Callable[[], object]


@dataclass(frozen=True)
class Service:
    """A model file and how it is served. threads: of each stream, 0 for the runtime's own choice; streams: of each process.

    wait: what threads do between two calls: active (spin), passive (sleep), or nothing for the runtime's own choice.
    pinning: on (each process keeps to cores of its own, and each thread to one of them), off, or the runtime's own choice.
    """

    path: str
    runtime: str
    size: int
    batch: int = 1
    threads: int = 0
    streams: int = 1
    processes: int = 1
    wait: str = ""
    pinning: str = ""

    @property
    def setting(self) -> str:
        """What is not the runtime's own choice, for example `wait passive`."""
        chosen = {"wait": self.wait, "pinning": self.pinning}
        return ", ".join(f"{name} {value}" for name, value in chosen.items() if value)


def services(path: str, runtime: str, size: int, batches: Sequence[int], cores: int) -> list[Service]:
    """What is compared for one model: the first takes one request at a time, one image each, with a thread a core.

    Then two requests at a time, in two streams and in two processes, also with cores of their own, which share the cores;
    larger batches; other numbers of threads, the runtime's own choice among them; and other ways to wait and to pin.
    """
    one, half = Service(path, runtime, size, 1, cores), max(1, cores // 2)
    found = [replace(one, threads=half, streams=2), replace(one, threads=half, processes=2)]
    if cores > 1:
        found.append(replace(one, threads=half, processes=2, pinning="on"))
    found += [replace(one, batch=batch) for batch in batches if batch > 1]
    found += [replace(one, threads=2**power) for power in range(cores.bit_length()) if 2**power < cores]
    found += [replace(one, threads=0)]
    found += [replace(one, wait=wait) for wait in WAITS[runtime]]
    return [one, *found, replace(one, pinning=PINNINGS[runtime])]


# What differs from a runtime's own choice: ONNX Runtime spins, OpenVINO's TBB has no such setting, but pins its threads.
WAITS = {"eager": ("active", "passive"), "onnxruntime": ("passive",), "openvino": (), NOTHING: ()}
PINNINGS = {"eager": "on", "onnxruntime": "on", "openvino": "off", NOTHING: "on"}


class Server:
    """The processes of a service, loaded and warm; leave it (`with`) to end them. Every measure gives the columns of MEASURED.

    Raises StudyError when a process ends before it should, with what it said last.
    """

    def __init__(self, service: Service) -> None:
        """Start them, on as many cores as `machine.usable_cores` finds, and wait until all have warmed up."""
        usable_cores(service.threads)
        self.service = service
        self._errors = tempfile.TemporaryFile("w+")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [sys.executable, "-m", "helpers.serve.load"]
        self._processes = [
            subprocess.Popen(command, **pipes, text=True, env=environment(service)) for _ in range(service.processes)
        ]
        try:
            self._ask(*({**asdict(service), "process": number} for number in range(service.processes)))
        except BaseException:
            self.close()
            raise

    def hot(self, seconds: float) -> dict[str, Any]:
        """Each stream calls again as soon as it is answered."""
        return self._measure("hot", {"how": "hot", "seconds": seconds})

    def rested(self, idle_ms: int, seconds: float, warm_ms: int = 0) -> dict[str, Any]:
        """Each call is due after `idle_ms` ms of rest, in which the model is kept warm by a call every `warm_ms`, 0 for none."""
        asked = {"how": "rested", "idle_s": idle_ms / 1000, "seconds": seconds, "warm_s": warm_ms / 1000}
        warm = {"setting": f"keep warm, {warm_ms} ms"} if warm_ms else {}
        return self._measure(f"idle_{idle_ms}", asked) | warm

    def loaded(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Requests arrive at random (Poisson), `rate` a second in all, whether or not the earlier ones are answered.

        A request waits from when it was due. Each process gets its share of them. The load lasts `seconds`, or as long as
        ENOUGH requests take to come, but no more than ten times that. What is not answered by twice its length is given up, and
        counts with what it has waited until then. Raises StudyError for a rate that is no positive number.
        """
        if not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
            raise StudyError(f"rate is {rate!r}; give a positive number of requests a second.")
        lasts = max(seconds, min(10 * seconds, ENOUGH / rate))
        each = rate / self.service.processes
        due = [arrivals(each, lasts, seed + number) for number in range(self.service.processes)]
        asked = ({"how": "loaded", "due": of, "limit_s": 2 * lasts} for of in due)
        return self._measure("load", *asked) | {"rate": float(rate)}

    def _measure(self, pace: str, *asked: dict[str, Any]) -> dict[str, Any]:
        """What all processes found. asked: the same of all, or of each its own."""
        found = self._ask(*(asked if len(asked) == len(self._processes) else asked * len(self._processes)))
        times = np.concatenate([of["ms"] for of in found])
        served = {key: getattr(self.service, key) for key in MEASURED if hasattr(self.service, key)}
        return served | {
            "pace": pace,
            "rate": 0.0,
            "n": len(times),
            "images_per_second": self.service.batch * sum(of["answered"] / of["seconds"] for of in found),
            "p50_ms": float(np.median(times)),
            "p99_ms": float(np.percentile(times, 99)),
            "cores_busy": sum(of["cpu_seconds"] / of["seconds"] for of in found),
            "memory_bytes": sum(of["memory_bytes"] for of in found),
        }

    def _ask(self, *asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Send each process a line, at about the same moment, and wait for the answers of all."""
        try:
            for process, line in zip(self._processes, asked, strict=True):
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
            return [json.loads(process.stdout.readline()) for process in self._processes]
        except (OSError, ValueError) as error:
            self._errors.seek(0)
            codes = [process.poll() for process in self._processes]
            said = self._errors.read().strip().splitlines() or [f"it said nothing; exit codes {codes}"]
            raise StudyError(f"A process that served {self.service.runtime} ended ({said[-1]}).") from error

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Columns of load that a measure gives: all but what the file is and where it was measured.
MEASURED = [column for column in COLUMNS["load"] if column not in ("arch", "arm", "machine", "run_id")]


def environment(service: Service) -> dict[str, str]:
    """The environment variables of a process that serves; OpenMP, which PyTorch's threads come from, reads them at its start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(THREAD_VARIABLES)}
    chosen = {"OMP_NUM_THREADS": str(service.threads)} if service.threads else {}
    if service.wait:
        blocktime = "infinite" if service.wait == "active" else "0"  # where OpenMP is Intel's
        chosen |= {"OMP_WAIT_POLICY": service.wait.upper(), "KMP_BLOCKTIME": blocktime}
    if service.pinning:
        chosen["OMP_PROC_BIND"] = "true" if service.pinning == "on" else "false"
    return inherited | chosen


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due: seconds from the start, ascending. A Poisson process, given that it had `rate` * `seconds` of them."""
    count = math.ceil(rate * seconds)
    return sorted(np.random.default_rng(seed).uniform(0, seconds, count))


def hot(calls: Sequence[Call], seconds: float) -> list[float]:
    """Each stream calls until `seconds` are over, at least once; returns the seconds of each call."""
    until = time.perf_counter() + seconds

    def stream(call: Call) -> list[float]:
        times = []
        while not times or time.perf_counter() < until:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return times

    return [taken for times in _side_by_side(calls, stream) for taken in times]


def rested(calls: Sequence[Call], idle_s: float, seconds: float, warm_s: float = 0.0) -> list[float]:
    """Calls of the first stream, each due `idle_s` after the one before was answered; seconds from due to answer.

    warm_s: seconds from one keep-warm call to the next in the rest, 0 for none. One that is under way makes the request wait.
    """
    call, times, until = calls[0], [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        due = time.perf_counter() + idle_s
        while warm_s and time.perf_counter() + warm_s < due:
            time.sleep(warm_s)
            call()
        time.sleep(max(0.0, due - time.perf_counter()))
        call()
        times.append(time.perf_counter() - due)
    return times


def loaded(calls: Sequence[Call], due: Sequence[float], limit_s: float) -> tuple[list[float], int]:
    """Answer requests in the order in which they are due, by whichever stream is free; at most `limit_s` seconds.

    due: seconds from the start. Returns seconds from due to answer of all, and how many were answered: the others count
    with what they have waited until `limit_s`.
    """
    waited = [max(0.0, limit_s - at) for at in due]
    queue, answered, started = itertools.count(), [], time.perf_counter()  # taking from a count is one step for threads

    def stream(call: Call) -> None:
        while (number := next(queue)) < len(due):
            time.sleep(max(0.0, started + due[number] - time.perf_counter()))
            if time.perf_counter() - started > limit_s:
                return
            call()
            waited[number] = time.perf_counter() - started - due[number]
            answered.append(number)

    _side_by_side(calls, stream)
    return waited, len(answered)


def _side_by_side(calls: Sequence[Call], stream: Callable[[Call], Any]) -> list[Any]:
    """What `stream` gives for each call, all at the same time; a single one runs in this thread, which may be pinned."""
    if len(calls) == 1:
        return [stream(calls[0])]
    given: list[Any] = [None] * len(calls)

    def one(number: int) -> None:
        given[number] = stream(calls[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def load(service: Service, process: int = 0) -> list[Call]:
    """Load the model of a service into this process: a call for each stream, on images of noise. Nothing else is imported.

    process: its number; pinned, it keeps to cores of its own.
    """
    cores = sorted(os.sched_getaffinity(0))
    if service.pinning == "on" and service.threads:
        first = process * service.threads * service.streams
        cores = [cores[(first + n) % len(cores)] for n in range(service.threads * service.streams)]
        os.sched_setaffinity(0, cores)
    shape = (service.batch, 3, service.size, service.size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    loaders = {"eager": _eager, "onnxruntime": _onnxruntime, "openvino": _openvino, NOTHING: _nothing}
    return [partial(predictor, images) for predictor in loaders[service.runtime](service, cores)]


def _nothing(service: Service, cores: Sequence[int]) -> list[Callable[[np.ndarray], object]]:
    return [len] * service.streams


def _eager(service: Service, cores: Sequence[int]) -> list[Callable[[np.ndarray], object]]:
    from helpers.train.models import build_model, module_predictor
    from helpers.train.weights import load_state, load_weights

    state, metadata = load_weights(Path(service.path))
    model = build_model(metadata["arch"])
    load_state(model, state, Path(service.path))
    return [module_predictor(model)] * service.streams


def _onnxruntime(service: Service, cores: Sequence[int]) -> list[Callable[[np.ndarray], object]]:
    from helpers.serve.sessions import onnxruntime_session

    threads, config = service.threads, {}
    if service.wait:
        config["session.intra_op.allow_spinning"] = "1" if service.wait == "active" else "0"
    if service.pinning == "on" and threads > 1:  # of all threads but the caller; cores are counted from 1
        config["session.intra_op_thread_affinities"] = ";".join(str(core + 1) for core in cores[1:])
    # The streams call one session and compute, too: the rest of its threads are the pool's.
    pool = service.streams * (threads - 1) + 1 if threads else 0
    session = onnxruntime_session(Path(service.path), pool, **config)
    if service.pinning == "on" and threads > 1:
        os.sched_setaffinity(0, cores[:1])  # this thread alone: the pool's have been started
    return [lambda images: session.run(None, {"images": images})] * service.streams


def _openvino(service: Service, cores: Sequence[int]) -> list[Callable[[np.ndarray], object]]:
    from helpers.ir import read_openvino
    from helpers.serve.sessions import compile_openvino, openvino_predictor

    config: dict[str, object] = {"NUM_STREAMS": service.streams}
    if service.pinning:
        config["ENABLE_CPU_PINNING"] = service.pinning == "on"
    compiled = compile_openvino(
        read_openvino(Path(service.path)), service.batch, service.threads * service.streams, **config
    )
    return [openvino_predictor(compiled) for _ in range(service.streams)]


def _serve(answers: TextIO) -> None:
    """The process: a service on the first line, then what to measure; it ends with its input."""
    given = json.loads(sys.stdin.readline())
    calls = load(Service(**{name: value for name, value in given.items() if name != "process"}), given["process"])
    hot(calls, WARM_S)
    ways = {"hot": hot, "rested": rested, "loaded": loaded}
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started, used = time.perf_counter(), time.process_time()
        found = ways[asked.pop("how")](calls, **asked)
        spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
        times, answered = found if isinstance(found, tuple) else (found, len(found))
        memory = psutil.Process().memory_info().rss
        answer = {"ms": [1e3 * s for s in times], "answered": answered, "memory_bytes": memory} | spent
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # open until what goes wrong is said: its end is what the other side waits for
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        _serve(answers)
    except StudyError as error:
        sys.exit(str(error))
