"""From inputs' edits to settled edits: align, resolve, plan, settle."""
