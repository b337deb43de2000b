"""Data: tar shards planned, packed and read. Nothing in them can run code or leave its folder."""

from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.loader import Loader, Sample
from dstrain.data.pack import PackReport, pack
from dstrain.data.plan import Draw, Plan

__all__ = ["Dataset", "Draw", "Loader", "PackReport", "Plan", "Sample", "open_dataset", "pack"]
