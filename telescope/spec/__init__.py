"""The spec of a sweep: its tables, their validation, and the fingerprint."""
