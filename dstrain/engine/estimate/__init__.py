"""What a run will need, before it starts: memory, bytes over links, a floor of the step's time, the best ds_config."""

from dstrain.engine.estimate.advice import Advice, Candidate, advise
from dstrain.engine.estimate.core import Choice, Estimate, estimate
from dstrain.engine.estimate.load import Load, load_of
from dstrain.engine.estimate.machine import Machine

__all__ = ["Advice", "Candidate", "Choice", "Estimate", "Load", "Machine", "advise", "estimate", "load_of"]
