"""The runtime: sessions over bundles, and their measurement. `edgeq.load` is the way in."""
