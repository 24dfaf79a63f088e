"""What the results of a sweep say: its answer, how sure it is, and what it cost."""
