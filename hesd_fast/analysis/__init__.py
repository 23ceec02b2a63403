"""The pipeline from a problem to its report: settings, the plan of a run, checks."""
