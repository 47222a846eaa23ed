"""Training: a run from one YAML file, on the Hugging Face Trainer."""
