"""From text to batches: corpus, tokenizer, indexed tokens, order of samples, loader. Only `loader` needs torch."""
