"""The cost model of ONNX models: what a session of ONNX Runtime takes."""
