"""Benchmarks: dbsession beside its peers, in one run. `tests/benchmarks/run` runs them; see there."""
