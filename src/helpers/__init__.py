"""What two or more notebooks of the study share. Start reading at `notebooks/`; the first lines of each module say what it is for."""

import sys

# OpenVINO and NNCF report their import, unless this package is missing; then they fall back to their silent stubs.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
