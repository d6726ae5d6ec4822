"""The deepseek family for Light: DeepSeek-V2-Lite, V2 and V2.5, V3, R1, and what else has their two architectures.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoint's names, `kv.py`
what a token keeps, `config.py` the shape they share.
"""
