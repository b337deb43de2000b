"""Shards on this machine: tar files, their indexes, and what can be wrong with them."""
