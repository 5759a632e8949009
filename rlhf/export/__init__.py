"""What users take away: finished stages as model folders, adapters and GGUF files, each with a model card."""
