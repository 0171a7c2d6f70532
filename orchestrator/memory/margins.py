"""Margins of GPU memory, set aside beside what was measured. From runs on an H200 (docs/benchmarks/memory.md)."""

FIRST_HEADROOM = 200_000_000  # bytes that a context grows by, at most, with the kernels of its first task
HEADROOM = 32_000_000  # afterwards
MARGIN = 1.1  # of a workspace that was seen, for what the allocator can't fill
ROUNDING = 300_000_000  # bytes, of its blocks; with less, a denoiser at 1024 × 1024 was seen to run out
UNSEEN = 1.25  # of a workspace taken from another size
FIXED_PART = 0.25  # of it, whatever the size
MORE = 1.5  # of one that was too small
WORTH_LEARNING = 1.03  # times what was seen: MARGIN covers less, and a lease anew costs more than it brings
WORTH_TELLING = 1 << 20  # bytes that a worker keeps more than before, for that to count as growing
