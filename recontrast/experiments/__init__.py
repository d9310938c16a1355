"""The tables of the paper, run again."""
