"""Attention by warps with roles: some only load, the others only multiply.

For Hopper, in Gluon. The portable kernels have every warp do everything: a warp that waits for a product asks
for no keys meanwhile. Here loaders run ahead of the multipliers as far as a ring of buffers reaches, from one
part of a program's work to the next. Who reads what, scores and the algebra of states are the portable
kernels' own functions, for Gluon calls what Triton calls.

Arguments go through these kernels in groups:

    cache    k_ptr, v_ptr, their strides, cache_batch_idx_ptr, cache_rows, block_table_ptr, table_stride,
             pool_pages
    lengths  cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
             window_left, window_right
    queries  q_ptr, its strides, cu_seqlens_q_ptr
    scoring  alibi_ptr, its strides, sinks_ptr, scale, softcap, window_left, window_right
    tiles    row of the cache; [lo, hi) of the slots seen; first tile, step from each to the next, how many
"""
