"""DeepSpeed lives here and nowhere else."""
