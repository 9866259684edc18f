import re

from helpers import bench
from helpers.quantization import ENGINES


def test_bench_prints_every_ratio(monkeypatch, capsys):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    for name, value in {"BATCH": 16, "STEPS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main()
    said = capsys.readouterr().out
    ratios = dict(re.findall(r"\(([ab])\).*: +([0-9.]+)$", said, re.M))
    speeds = [float(times) for times in re.findall(r"\(d\) .* ms, +([0-9.]+) x eager FP32", said)]
    assert ratios.keys() == {"a", "b"} and min(map(float, ratios.values())) > 0
    assert len(speeds) == 4 + 2 * len(ENGINES) and speeds[0] == 1.0 and min(speeds) > 0
