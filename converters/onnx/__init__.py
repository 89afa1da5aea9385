"""ONNX files: what they hold, what a call computes, and what it takes."""
