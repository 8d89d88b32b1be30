"""Files that are whole or not there. Nothing here knows layers or models."""
