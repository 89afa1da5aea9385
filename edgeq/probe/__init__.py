"""``edgeq devices probe``: measure the machine it runs on and write its profile."""
