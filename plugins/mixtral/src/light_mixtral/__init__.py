"""The mixtral family for Light: Mixtral 8x7B, 8x22B and whatever else is a `MixtralForCausalLM`.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoint's names, `kv.py`
what a token keeps, `config.py` the shape they share.
"""
