import re
import sys

from conftest import run

from helpers.quantization import ENGINES

SMALL = "from helpers import bench; bench.BATCH, bench.STEPS, bench.ROUNDS = 16, 2, 1; bench.main()"


def test_bench_prints_every_ratio():
    # In its own process: DataLoader's workers leave a SIGCHLD handler behind, and when the next child of pytest ends,
    # that handler and pytest's faulthandler together end pytest with a segmentation fault.
    done = run(sys.executable, "-c", SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = dict(re.findall(r"\(([ab])\).*: +([0-9.]+)$", done.stdout, re.M))
    speeds = [float(times) for times in re.findall(r"\(d\) .* ms, +([0-9.]+) x eager FP32", done.stdout)]
    assert ratios.keys() == {"a", "b"} and min(map(float, ratios.values())) > 0
    assert len(speeds) == 4 + 2 * len(ENGINES) and speeds[0] == 1.0 and min(speeds) > 0
