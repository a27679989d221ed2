"""The runtimes that can be measured: ONNX Runtime, and the peers."""
