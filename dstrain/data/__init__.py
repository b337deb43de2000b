"""Data: tar shards planned, packed and read. Nothing in them can run code or leave its folder."""

from dstrain.data.dataset import Dataset, Source, open_dataset
from dstrain.data.loader import Loader, Pack, Sample
from dstrain.data.packing.pack import PackReport, pack
from dstrain.data.plan import Draw, Plan

__all__ = ["Dataset", "Draw", "Loader", "Pack", "PackReport", "Plan", "Sample", "Source", "open_dataset", "pack"]
