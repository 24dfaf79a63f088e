"""Hands over in the words of other people's trainers: one file for each trainer."""
