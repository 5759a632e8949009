"""Loading, adapting and saving models and tokenizers."""
