"""Writing a model as an ONNX bundle, and running one."""
