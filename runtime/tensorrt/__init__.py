"""TensorRT and TensorRT-RTX: engines built from a bundle's ONNX graph, kept between runs, and executed.

An engine is a cache. What a bundle ships is the graph with its explicit Q/DQ nodes; the engine is made of it on the
target, or ahead of time by TensorRT-RTX, which builds without a GPU. Every function that speaks to TensorRT takes the
module as an argument, so that the same code serves ``tensorrt`` 10.3 to 11.x and ``tensorrt_rtx``.

Building is tested with TensorRT-RTX on machines without a GPU. What needs one (`session`, `driver`) has tests marked
``cuda``.
"""
