"""dstrain: a DeepSpeed-centric trainer for large diffusion transformers."""

__version__ = "0.1.0"
