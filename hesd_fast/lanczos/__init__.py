"""Block Lanczos: its options, where its basis lies, a run of the compiled recurrence, and the matrix it leaves."""
