"""What every type of every tensor costs in output quality, before anything is quantized for good.

`curvature` holds the model of the output's KL divergence, `fisher` and `probes` are two ways to measure it, and `table`
turns it into nats for each (tensor, type) from blocks that ggml really made.
"""
