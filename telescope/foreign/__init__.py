"""Other people's trainers: a command per trial, or a Python function."""
