"""Finished stages at work: served over HTTP, talked to, and evaluated."""
