"""The fit: what is believed before any result, the model, its posterior, and its optimum."""
