"""What is kept: the database of results, and the results folder."""
