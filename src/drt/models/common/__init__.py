"""What several models share: checks on inputs, ragged rows, the baselines' configuration, cache and head."""
