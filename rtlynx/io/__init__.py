"""Checkpoints: `rtlynx.save`, `rtlynx.load`, and diffusers' own `save_pretrained` and `from_pretrained`."""
