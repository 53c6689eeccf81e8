"""Measurements behind docs/performance.md: ratios in one run, raw times beside them."""
