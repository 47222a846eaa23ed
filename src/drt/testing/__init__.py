"""Input factories and the tolerance rule that tests and benchmarks share."""
