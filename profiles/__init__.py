"""Device profiles and the cost model that turns a plan into predicted memory and latency."""
