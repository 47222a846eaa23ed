"""Loss and gradient of one block of logits; none imports another."""
