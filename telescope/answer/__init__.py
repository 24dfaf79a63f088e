"""The answer of a sweep, from its results: settings, certainty and cost."""
