"""One sweep from spec to answer: the rooms, wired."""
