"""A model, a loss and data as one fixed function of the selected parameters."""
