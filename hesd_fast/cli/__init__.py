"""The command line ``hesd``."""
