"""Statistics and the comparison report."""
