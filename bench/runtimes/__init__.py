"""Runtimes that can be measured: ONNX Runtime on CPU and GPU, and the peers, each a worker process of its own."""
