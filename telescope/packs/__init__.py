"""Many trials as one stacked model. Nothing else needs this room."""
