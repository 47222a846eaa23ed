"""One function a figure: records of an evaluation in, a matplotlib Figure out."""
