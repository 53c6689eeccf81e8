"""From values to a grid, so that what was added survives."""
