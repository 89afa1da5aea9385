"""Rewriting of ONNX graphs: cleaning, INT8, FP8, weight-only and half precision, and what of it a runtime executes."""
