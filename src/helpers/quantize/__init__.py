"""INT8 by every tool of the study: eager PyTorch, PT2E, NNCF, ONNX Runtime."""
