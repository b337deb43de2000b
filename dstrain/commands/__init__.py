"""The subcommands of `dstrain`, one file each."""
