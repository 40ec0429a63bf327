"""What many runs say together: loss against parameters and tokens, depth and accuracy against size and penalty."""
