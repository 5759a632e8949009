"""The user's own machine measured: what it could do, and how much of that training and generation reach."""
