import json
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.files import StudyError
from helpers.quantize.arms import ENGINES
from helpers.serve.export import convert_to_openvino, export_onnx, export_torchscript
from helpers.serve.profiling import (
    batch_change,
    capped_logits,
    floor_ms,
    in_fresh_process,
    layer_costs,
    layer_floors,
    memory_traffic,
    onednn_events,
    onednn_reordered,
    openvino_nodes,
    pytorch_name,
    time_calls,
    torch_ops,
    touched_taps,
)
from helpers.train.models import build_model, count_parameters, module_predictor
from helpers.train.taps import trim_dead_taps


def test_a_padded_3x3_kernel_on_one_pixel_does_a_ninth_of_its_work():
    conv = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False))
    row = layer_costs(conv, 1)[0]
    assert (row["macs"], row["useful_macs"]) == (135, 15)
    assert (row["weights"], row["useful_weights"], row["activations"]) == (135, 15, 8)


def test_touched_taps_by_hand():
    assert touched_taps(2, 3, 1, 1, 1) == 4  # outputs at 0 and 1 see taps 1, 2 and 0, 1
    assert touched_taps(4, 3, 2, 1, 1) == 5  # outputs at 0 and 2 see taps 1, 2 and 0, 1, 2
    assert touched_taps(3, 3, 1, 2, 2) == 5  # dilated: 1, 2 | 1 | 0, 1 of taps that lie 2 apart
    assert touched_taps(8, 1, 2, 0, 1) == 4


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_counts_are_those_of_pytorch_s_counter_and_of_the_trimmed_model(arch):
    model = build_model(arch).eval()
    rows = layer_costs(model, 32)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert 2 * sum(row["macs"] for row in rows) == counter.get_total_flops()
    cut = count_parameters(model) - count_parameters(trim_dead_taps(model, 32))
    assert sum(row["weights"] - row["useful_weights"] for row in rows) == cut


def test_a_model_without_float_layers_is_refused():
    with pytest.raises(StudyError, match="before it is quantized"):
        layer_costs(nn.ReLU(), 32)


def test_the_floor_is_the_longer_of_computing_and_moving():
    # 2e6 multiply-accumulates at 1 GMAC/s: 2 ms; 6e6 bytes at 2 GB/s: 3 ms.
    np.testing.assert_allclose(floor_ms([2e6, 2e6], [6e6, 1e6], 1, 2), [3, 2])
    with pytest.raises(ValueError, match="must be positive"):
        floor_ms([1], [1], 0, 1)


def test_memory_traffic_counts_its_bytes():
    read, bytes_read = memory_traffic(1200)
    triad, bytes_triad = memory_traffic(1200, triad=True)
    assert (bytes_read, bytes_triad) == (1200, 1200)
    assert float(read()) == 300 and (triad() == 4).all()
    assert (time_calls(read, 3) > 0).all()


def test_onednn_s_lines_are_summed_up():
    lines = [
        "onednn_verbose,v1,info,cpu,runtime:OpenMP,nthr:2",
        "onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation,exec_time",
        "onednn_verbose,v1,primitive,create:cache_hit,cpu,convolution,brg_conv_fwd:avx512_core_vnni,f,src:u8,a,b,mb1,0.009",
        "onednn_verbose,v1,primitive,exec,cpu,convolution,brg_conv_fwd:avx512_core_vnni,f,src:u8,a,b,mb1,0.25",
        "onednn_verbose,v1,primitive,exec,cpu,convolution,brg_conv_fwd:avx512_core_vnni,f,src:u8,a,b,mb1,0.5",
        "something else, printed, by, the, same, process, 3",
    ]
    assert onednn_events("\n".join(lines)) == {"create convolution": (1, 0.009), "exec convolution": (2, 0.75)}
    assert onednn_reordered("\n".join(lines)) == set()
    copied = "onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:s8,a,b,512x256x1x1,0.1"
    assert onednn_reordered("\n".join([*lines, copied])) == {"512x256x1x1"}


def test_torch_s_ops_are_split_into_kernels_and_wrappers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    ops = torch_ops(module_predictor(net), np.zeros((1, 3, 32, 32), np.float32), calls=3)
    kernel = {row["op"]: row["kernel"] for row in ops}
    assert not kernel["aten::conv2d"] and not kernel["aten::convolution"] and not kernel["aten::empty"]
    assert sum("conv" in op for op, computes in kernel.items() if computes) == 1
    assert next(row for row in ops if row["op"] == "aten::conv2d")["count"] == 1


def test_the_times_of_operators_are_those_of_one_call(monkeypatch):
    """Two calls, 5 + 1 and 2 + 3 microseconds: the second one is reported, not the least of each operator."""
    calls = iter([[], [], [("aten::a", 5), ("aten::b", 1)], [("aten::a", 2), ("aten::b", 3)]])
    happened = []

    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            ops = [{"name": op, "self_cpu_time_total": time, "cpu_children": []} for op, time in happened]
            self.function_events = [SimpleNamespace(**op) for op in ops]

    def predictor(_images):
        happened[:] = next(calls)

    monkeypatch.setattr("torch.autograd.profiler.profile", Profile)
    assert {row["op"]: row["ms"] for row in torch_ops(predictor, None, calls=2)} == {"aten::a": 0.002, "aten::b": 0.003}


def test_openvino_s_nodes_carry_pytorch_s_names(tmp_path):
    model = build_model("resnet18").eval()
    export_onnx(model, tmp_path / "model.onnx")
    convert_to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
    images = np.zeros((1, 3, 32, 32), np.float32)
    nodes = openvino_nodes(tmp_path / "model.xml", images, threads=1, calls=2, repeats=1)
    assert {row["layer"] for row in layer_costs(model, 32)} <= {row["layer"] for row in nodes}
    assert pytorch_name("/layer2/0/downsample/0/Conv/WithoutBiases", "Convolution") == "layer2.0.downsample.0"


def test_a_fresh_process_gets_its_environment_and_says_why_it_failed():
    assert in_fresh_process(os.getenv, ["CAP"], {"CAP": "AVX2"})[0] == "AVX2"
    with pytest.raises(StudyError, match="JSONDecodeError"):
        in_fresh_process(json.loads, ["{"])


def test_the_floor_of_a_call_grows_with_the_batch_and_its_reading_is_interpolated():
    """1e6 MACs and 1e6 weights: bytes bound one image; 100 images are bound by arithmetic, 100 ms at 1 GMAC/s."""
    costs = pd.DataFrame({"macs": [1e6], "useful_macs": [5e5], "weights": [1e6], "useful_weights": [1e6]}, ["conv"])
    costs["activations"] = 0
    reading = pd.Series({1e5: 1.0, 1e7: 0.5})  # GB/s; 1e6 bytes lie halfway between them on the logarithmic axis
    np.testing.assert_allclose(layer_floors(costs, 1, 1, 1e9, reading), [1 / 0.75])
    np.testing.assert_allclose(layer_floors(costs, 100, 1, 1, reading), [100])
    np.testing.assert_allclose(layer_floors(costs, 100, 1, 1, reading, useful=True), [50])


@pytest.mark.skipif(not ENGINES, reason="no eager-mode INT8 here")
def test_a_file_gives_the_same_logits_in_a_process_without_a_cap(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    export_torchscript(net, tmp_path / "net.pt")
    images = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    logits, _ = capped_logits({"net": tmp_path / "net.pt"}, images, threads=1)
    np.testing.assert_allclose(logits["net"], module_predictor(net)(images), rtol=1e-5)


@pytest.mark.skipif(not ENGINES, reason="no eager-mode INT8 here")
def test_the_parts_of_a_call_add_up_to_it(tmp_path):
    export_torchscript(nn.Sequential(nn.Conv2d(3, 8, 7)), tmp_path / "net.pt")
    row, _ = batch_change(tmp_path / "net.pt", ENGINES[0], threads=1, first=4, batch=1, calls=3)
    assert row["ms"] == pytest.approx(row["kernels"] + row["reorder"] + row["rest"])
    assert row["executed"] >= 1
