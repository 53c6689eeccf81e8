"""Read, merge, convert and verify adapter checkpoints."""

__version__ = "0.1.0"
