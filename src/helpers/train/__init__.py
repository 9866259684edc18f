"""Data, models, trimming, weights and the one training loop: what everything else starts from."""
