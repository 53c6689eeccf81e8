"""One module or package per on-disk format: what it stores, how to detect, read and write it."""
