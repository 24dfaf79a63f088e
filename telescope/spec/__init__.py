"""What a sweep says: its tables, their validation, and the fingerprint."""
