"""The qwen_moe family for Light: Qwen1.5-MoE and Qwen2-57B-A14B, Qwen3-30B-A3B and Qwen3-235B-A22B, and OLMoE.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoint's names, `kv.py`
what a token keeps, `config.py` the shape they share.
"""
