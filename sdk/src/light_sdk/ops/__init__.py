"""The SDK's ops, one folder each: `reference.py` defines it in plain torch, `kernel.py` is Triton, `cpu.py` is faster torch.

    linear       F.linear                                    rotary       rotary position embedding, in place
    rms_norm     RMSNorm, residual addition fused            write_kv     keys and values of a step into the KV pool
    layer_norm   LayerNorm, residual addition fused          act_and_mul  gated activation (SwiGLU, GEGLU)
    attention    causal attention over token-indexed KV      activation   element-wise activation
    mla_attention  causal attention over latents            write_latent latent and rotary key of a step into the pool
    rotary_kv    rotary, then write_kv, in one kernel        gated_linear linear, then act_and_mul, in one kernel
    route_experts  which experts a token goes to, top-k      fused_experts  products of sparse feed-forward blocks
    attend_runs  attention within sequences, no mask, no KV
    route_tokens   the router's product, then route_experts  latent_attention  write_latent, then mla_attention

What several share: `tuning.py` (launch parameters by GPU), `dependent.py` (kernels that start early), `counters.py`,
`runs.py` (prefill chunks by what attends to them), `compiled.py` (numba).

Models never import from here: they ask `model.ops.select("<op>", **facts)` while layers are built. Registered in
`light_sdk.hooks`. Shapes follow the legend of `light_core.types`.
"""
