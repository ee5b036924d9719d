"""The Mistral forward pass: token ids and KV cache in, logits out."""
