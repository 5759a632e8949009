"""Loading, adapting and saving models and tokenizers."""

from rlhf.models.lean import import_lean

import_lean()
