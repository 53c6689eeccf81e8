"""Factored matrices: what they are, and how they are cut to a budget."""
