"""Shards behind URLs: listed, fetched, and kept on the node."""
