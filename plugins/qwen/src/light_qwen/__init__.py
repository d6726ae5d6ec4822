"""The qwen family for Light: the text models of Qwen's first generation, Qwen1.5, Qwen2, Qwen2.5 and Qwen3.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoints' names, `kv.py`
what a token keeps, `config.py` the shape they share, `tokenizer.py` the first generation's vocabulary file.
"""
