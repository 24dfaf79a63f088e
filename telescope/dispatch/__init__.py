"""Carries trials from a source (what a ladder is) to a trainer, and the results back."""
