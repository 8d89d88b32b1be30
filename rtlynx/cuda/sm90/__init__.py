"""Device code for Hopper cards, and beside each kernel the host code that launches it."""
