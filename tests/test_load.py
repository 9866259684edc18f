import subprocess
import sys
import threading
import time

import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper

from helpers.files import StudyError
from helpers.machine import cpu_quota, usable_cores
from helpers.report import figures, tables
from helpers.report.records import gather, save_record
from helpers.report.results import Results
from helpers.report.schema import COLUMNS
from helpers.serve.load import MEASURED, NOTHING, Server, Service, arrivals, environment, loaded, rested, services
from helpers.train.models import build_model
from helpers.train.weights import save_weights


def test_a_request_that_is_due_while_another_is_answered_counts_its_wait():
    stall, due = 0.2, [0.0, 0.01, 0.05, 0.1]
    calls = iter([stall, 0, 0, 0])
    waited, answered = loaded([lambda: time.sleep(next(calls))], due, 10)
    assert answered == len(due)
    assert all(wait >= stall - at for wait, at in zip(waited, due, strict=True))  # though their own calls took no time


def test_a_second_stream_answers_while_the_first_one_is_busy():
    others, lock = threading.Event(), threading.Lock()
    order = []

    def call():
        with lock:
            order.append(len(order))
            mine = order[-1]
            if mine == 5:
                others.set()
        if mine == 0:
            assert others.wait(30)  # until five others are answered, which one stream could not do

    assert loaded([call, call], [0.0] * 6, 60)[1] == 6


def test_an_overload_ends_and_what_was_not_answered_counts_with_its_wait():
    due, limit = [0.0] * 100, 0.1
    waited, answered = loaded([lambda: time.sleep(0.02)], due, limit)
    assert 0 < answered < len(due)
    assert waited[answered:] == [limit] * (len(due) - answered)


def test_keeping_warm_calls_in_the_rest_and_counts_only_the_requests():
    calls = []
    times = rested([lambda: calls.append(0)], idle_s=0.05, seconds=0.2, warm_s=0.005)
    assert len(calls) > len(times) >= 1
    calls.clear()
    times = rested([lambda: calls.append(0)], idle_s=0.05, seconds=0.1)
    assert len(calls) == len(times)


def test_arrivals_are_as_many_as_the_rate_says_in_order_and_the_same_for_a_seed():
    due = arrivals(50, 2, 0)
    assert len(due) == 100 and due == sorted(due) and 0 <= due[0] and due[-1] <= 2
    assert due == arrivals(50, 2, 0) != arrivals(50, 2, 1)
    assert len(arrivals(0.1, 1, 0)) == 1


@pytest.mark.parametrize("cores", [1, 2, 6])
def test_ways_to_serve_take_no_more_threads_than_there_are_cores(cores):
    for runtime in ("eager", "onnxruntime", "openvino"):
        found = services("model", runtime, 32, [1, 8], cores)
        assert len({*found}) == len(found)
        for service in found:
            side_by_side = service.streams * service.processes
            assert service.threads * side_by_side <= max(cores, side_by_side)
        assert {service.threads for service in found if service.streams == service.processes == 1} >= {0, 1, cores}


def test_a_service_does_not_inherit_the_threads_of_this_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    own = environment(Service("", "eager", 32))
    assert "OMP_NUM_THREADS" not in own and "OMP_WAIT_POLICY" not in own
    set_up = environment(Service("", "eager", 32, threads=1, wait="passive"))
    assert (set_up["OMP_NUM_THREADS"], set_up["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")


def test_every_pace_is_measured_in_fresh_processes():
    with Server(Service("", NOTHING, 32)) as one, Server(Service("", NOTHING, 32, processes=2, streams=2)) as two:
        hot, rest, load = one.hot(0.01), one.rested(10, 0.05), two.loaded(1000, 0.05, 0)
        assert {*hot} == {*rest} == {*load} == {*MEASURED}
        assert rest["pace"] == "idle_10" and load["n"] == 100  # the least for a 99th percentile
        assert load["memory_bytes"] > 1.5 * hot["memory_bytes"] > 1e7


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "fast"])
def test_a_rate_that_is_no_positive_number_ends_in_a_sentence(rate):
    with Server(Service("", NOTHING, 32)) as server, pytest.raises(StudyError, match="positive number of requests"):
        server.loaded(rate, 1, 0)


def test_a_model_that_cannot_be_served_ends_in_a_sentence(tmp_path):
    with pytest.raises(StudyError, match="served onnxruntime ended .*nowhere"):
        Server(Service(str(tmp_path / "nowhere.onnx"), "onnxruntime", 32, threads=1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of one layer for ONNX Runtime and OpenVINO, and ResNet18's weights for PyTorch."""
    folder = tmp_path_factory.mktemp("models")
    shape = ["batch", 3, 8, 8]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "tiny", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "tiny.onnx")
    save_weights(
        folder / "fp32.safetensors", build_model("resnet18").state_dict(), {"arch": "resnet18", "form": "float"}
    )
    return {"eager": folder / "fp32.safetensors"} | dict.fromkeys(("onnxruntime", "openvino"), folder / "tiny.onnx")


PACKAGES = {"eager": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}


@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_process_holds_its_own_runtime_only_so_that_its_memory_is_that_runtime_s(files, runtime):
    program = f"""
import sys
from helpers.serve.load import Service, hot, load
calls = load(Service({str(files[runtime])!r}, {runtime!r}, 8, batch=2, threads=1, streams=2))
assert len(calls) == 2 and len(hot(calls, 0)) == 2
print(*({{"torch", "onnxruntime", "openvino", "nncf"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [PACKAGES[runtime]], done.stderr


def test_openvino_and_nncf_do_not_report_their_import():
    program = (
        "import sys, helpers.serve.export; print(*(name for name in sys.modules if 'openvino_telemetry.' in name))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_setting_of_a_runtime_is_one_that_it_takes(files, runtime):
    for service in services(str(files[runtime]), runtime, 8, [1], usable_cores()):
        with Server(service) as server:
            assert server.hot(0.01)["images_per_second"] > 0, service


CGROUPS = [
    ("0::/", {"cpu.max": "150000 100000"}, 1.5),
    ("0::/", {"cpu.max": "max 100000"}, None),
    ("0::/jobs/mine", {"jobs/cpu.max": "200000 100000", "jobs/mine/cpu.max": "max 100000"}, 2.0),
    ("0::/on/the/host", {"cpu.max": "50000 100000"}, 0.5),  # a path that is not mounted here
    (
        "4:cpu,cpuacct:/a",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        3.0,
    ),
    ("4:cpu,cpuacct:/a", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("5:cpuset:/\n0::/", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "100000"}, None),
]


@pytest.mark.parametrize(("membership", "limits", "quota"), CGROUPS)
def test_the_cpu_quota_is_the_least_that_a_cgroup_or_one_above_it_allows(tmp_path, membership, limits, quota):
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path, tmp_path / "membership") == quota


def test_more_threads_than_the_quota_or_the_cores_end_in_a_sentence(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("helpers.machine.cpu_quota", lambda: 2.5)
    assert (usable_cores(), usable_cores(1)) == (2, 1)
    with pytest.raises(StudyError, match="3 cores are asked for.*may use 2 .*runs on 4, with a CPU quota of 2.5"):
        Server(Service("", NOTHING, 32, threads=3))
    monkeypatch.setattr("helpers.machine.cpu_quota", lambda: None)
    with pytest.raises(StudyError, match="5 cores are asked for.*no CPU quota"):
        usable_cores(5)


def row(runtime="openvino", pace="hot", n=200, **more):
    of = {"arch": "resnet18", "arm": "fp32", "runtime": runtime, "threads": 2, "batch": 1, "size": 32, "streams": 1}
    of |= {"processes": 1, "setting": "", "pace": pace, "rate": 0.0, "n": n, "images_per_second": 100.0, "p50_ms": 1.0}
    return of | {"p99_ms": 5.0, "cores_busy": 1.0, "memory_bytes": 100e6, "machine": "m"} | more


def frame(*rows):
    return pd.DataFrame(rows)


def test_the_table_of_load_sets_latency_at_each_share_beside_what_is_answered_at_most():
    of = frame(
        row(),
        row(pace="load_50", rate=50.0, p50_ms=2.0, p99_ms=9.0),
        row(pace="load_90", rate=90.0, n=99),
        row(batch=8, images_per_second=400.0),
        row(threads=1),
        row(setting="wait passive"),
    )
    one, batch = tables.load(of).to_dict("records")
    assert (one["images/s"], one["p50 ms at 50 %"], one["p99 ms at 50 %"], one["MB"]) == (100.0, 2.0, 9.0, 100.0)
    assert pd.isna(one["p99 ms at 90 %"])  # too few requests for a 99th percentile
    assert (batch["batch"], batch["images/s"]) == (8, 400.0)
    assert figures.load(of) is not None and figures.load(of[of.pace == "hot"]) is None


def test_the_choice_under_load_is_the_most_within_the_limit_and_of_nearly_equals_the_one_with_least_memory():
    of = frame(
        row(pace="load_90", rate=100.0, p99_ms=8.0, processes=2, memory_bytes=200e6),
        row(pace="load_90", rate=96.0, p99_ms=8.0, streams=2),
        row(pace="load_50", rate=90.0, p99_ms=2.0, memory_bytes=1e6),  # not nearly as many
        row(pace="load_90", rate=500.0, p99_ms=30.0),  # too slow
        row(pace="load_90", rate=900.0, n=20),  # too few to know
    )
    (choice,) = tables.load_choice(of, 10).to_dict("records")
    assert (choice["streams"], choice["value"], choice["p99 ms"], choice["MB"]) == (2, 96.0, 8.0, 100.0)
    assert tables.load_choice(of, 1).empty


def test_the_choice_after_a_rest_is_the_shortest_wait_and_of_nearly_equals_the_one_that_keeps_fewest_cores_busy():
    of = frame(
        row(pace="idle_50", p50_ms=3.0),
        row(pace="idle_50", setting="wait active", p50_ms=1.00, cores_busy=2.0),
        row(pace="idle_50", setting="keep warm", p50_ms=1.04, cores_busy=0.3),
        row(pace="idle_10", threads=1, p50_ms=0.5),  # a shorter rest
    )
    (choice,) = tables.load_choice(of, 10).to_dict("records")
    assert (choice["need"], choice["setting"], choice["value"]) == ("ms after a rest", "keep warm", 1.04)
    shown = tables.rested(of).set_index("setting")
    assert shown["p50 ms after 50"]["wait active"] == 1.0 and shown["cores busy, 50"]["keep warm"] == 0.3


def test_the_choice_of_threads_is_the_fewest_of_nearly_equals_and_a_runtime_s_own_choice_comes_last():
    of = frame(
        row(threads=2, images_per_second=98.0),
        row(threads=0, images_per_second=100.0),
        row(threads=1, images_per_second=50.0),
        row(threads=2, images_per_second=300.0, setting="wait active"),
    )
    (choice,) = tables.load_choice(of, 10).to_dict("records")
    assert (choice["threads"], choice["value"]) == (2, 98.0)


def test_results_have_the_rows_of_load(tmp_path):
    save_record(str(tmp_path), "17_load", {}, None, {"load": [row(), row(pace="load_50", rate=50.0)]})
    gather(str(tmp_path), tmp_path / "results")
    of = Results.open(tmp_path / "results").tables["load"]
    assert [*of.columns] == COLUMNS["load"] and {*of.pace} == {"hot", "load_50"}
    assert tables.load(of)["images/s"].tolist() == [100.0]
