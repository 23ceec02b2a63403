"""Block Lanczos: options, memory, a run of the compiled recurrence, the loop of all runs, and the matrix they leave."""
