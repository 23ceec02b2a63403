"""The pipeline from a problem to its report: settings, memory, the loop over products, checks."""
