"""Verifying fused models: by their weights and by their outputs."""
