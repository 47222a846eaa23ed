"""Evaluations: each one yields records of one schema (`drt.eval.results`)."""
