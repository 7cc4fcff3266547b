"""What follows from an architecture, in closed form: counts are exact Python integers, torch is never needed.

Every function is branch-free in the fields that a spec may leave unknown (d_model, d_ff, n_heads, head_dim,
n_kv_heads, gated, vocab_size, n_layers, n_experts, top_k), so that float64 arrays that broadcast may stand in
for integers (`Spec.vectorised`); a count of up to 2**53 is still exact there.
"""
