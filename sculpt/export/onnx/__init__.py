"""ONNX: from a flat program to nodes of the operator set."""
