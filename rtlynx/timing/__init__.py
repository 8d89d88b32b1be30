"""Measurements of layers and of whole steps on the card at hand: what `rtlynx bench` runs."""
