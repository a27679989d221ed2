"""The ONNX graph of a decoder, node by node, and its weights."""
