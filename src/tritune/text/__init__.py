"""From prompts to token ids to packed batches."""
