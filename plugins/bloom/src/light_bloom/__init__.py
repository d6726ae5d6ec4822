"""The bloom family for Light: BLOOM and BLOOMZ, of any size.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoint's names, `kv.py`
what a token keeps, `config.py` the shape they share.
"""
