"""Measurements of single layers on the card at hand: what `rtlynx bench` runs."""
