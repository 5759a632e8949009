"""Reading, checking and batching the users' data."""
