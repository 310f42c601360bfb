"""Attention by warps with roles: some only load, the others only multiply. For Hopper, in Gluon.

The same algebra, tiles and results as the portable kernels, which do everything by every warp: there a warp
that waits for a product asks for no keys meanwhile. Here loaders run ahead as far as the ring of buffers in
shared memory reaches, across the parts of a run too.
"""
