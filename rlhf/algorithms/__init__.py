"""Pure functions on tensors: the maths of alignment, torch only."""
