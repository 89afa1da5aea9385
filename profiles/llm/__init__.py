"""The cost model of language models: memory and latency of a plan on a device."""
