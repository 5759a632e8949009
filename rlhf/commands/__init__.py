"""The commands of `rlhf` that have a file of their own; each imports what is heavy when it runs."""
