"""What a run found, and what follows from it: records, run files, baselines, gates, tables."""
