"""Storage: the database of results, and the results folder."""
