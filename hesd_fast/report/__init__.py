"""All that a run has found: kept, printed, drawn, saved and read."""
