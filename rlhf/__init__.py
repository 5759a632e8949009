"""Alignment of language models: one recipe from SFT to an honest comparison of PPO and DPO."""

__version__ = "0.1.0"
