"""Where metrics go beside `metrics.jsonl`; each sink imports its library when it is opened."""
