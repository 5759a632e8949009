"""Everything that knows Ray: actors, placement, weight transfer."""
