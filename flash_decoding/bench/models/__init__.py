"""The model suite: tokens per second of whole models over context, each column checked before it is timed."""
