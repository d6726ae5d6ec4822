"""The llama family for Light: Llama 1 to 3.2, Mistral, Yi and whatever else is a `LlamaForCausalLM`.

`hooks.py` answers the contract's hooks; `model.py` is the whole forward, `weights.py` the checkpoint's names, `kv.py`
what a token keeps, `config.py` the shape they share.
"""
