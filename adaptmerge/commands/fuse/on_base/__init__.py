"""What the base is to its adapters: what it was in training, and what quantising did to it."""
