"""Evaluation records as tables, and as one page with the paper's numbers beside them."""
