"""One file per merge method: a pure function from weighted edits to a factor expression."""
