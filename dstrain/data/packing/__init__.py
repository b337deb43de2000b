"""`dstrain pack`: from pictures, tables and tars to shards."""
