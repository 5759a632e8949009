"""Training and generation engines, and the objectives they optimise."""

import rlhf.models  # noqa: F401  before any module here imports PEFT: see rlhf/models/lean.py
