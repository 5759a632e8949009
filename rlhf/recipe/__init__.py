"""The recipe: schema, loading, planning."""
