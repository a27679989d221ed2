"""The portable target: standard ONNX operators only."""
