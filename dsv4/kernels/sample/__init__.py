"""From logits to tokens: bias, penalties, temperature, top-k, top-p, min-p, seeded draws."""
