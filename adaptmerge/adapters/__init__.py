"""What an adapter is: its graph, edits and families. Knows no file and no model."""
