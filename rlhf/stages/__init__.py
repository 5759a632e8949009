"""The pipeline, one readable loop per stage."""
