"""Heads, biases and tokens: what is stored whole, and how several of it become one."""
