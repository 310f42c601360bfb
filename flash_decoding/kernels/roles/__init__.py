"""Even splits of a contiguous cache by warps with roles: some only load, the others only multiply.

For Hopper, in Gluon. The portable kernel has every warp do everything: a warp that waits for a product asks
for no keys meanwhile. Here loaders run ahead of the multipliers as far as a ring of buffers reaches. Splits,
scores and the algebra of states are the portable kernel's own functions, for Gluon calls what Triton calls.
"""
