"""Several GPUs, one model: who the ranks are, which part of each weight they hold, how they add up and gather."""
