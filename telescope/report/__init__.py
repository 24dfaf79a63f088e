"""Shows: tables, figures, the live view."""
