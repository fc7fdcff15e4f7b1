"""One optimizer step on one global batch, however the model is split: the seam between trainer and engines."""
