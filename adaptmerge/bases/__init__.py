"""A base model seen through its headers."""
