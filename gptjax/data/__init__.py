"""From raw text to batches: sources, tokenizers, the token store and the pipeline."""
