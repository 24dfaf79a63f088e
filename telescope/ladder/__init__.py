"""Decides: records and numbers in, decisions with reasons out. No clock, no files, no torch."""
