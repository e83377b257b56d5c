"""Training by stages, with Hugging Face's Trainer."""
