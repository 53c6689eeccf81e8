"""The files of a fused model: how they are cut into pieces, written and taken up again."""
