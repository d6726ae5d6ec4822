"""The images of Qwen-VL, Qwen2-VL and Qwen2.5-VL for Light, in front of text models that the qwen plugin serves.

`hooks.py` answers the contract's hooks and wraps those of the text model. Of Qwen2-VL and later: `config.py` has sizes,
`images.py` cuts pictures, `positions.py` counts on three axes, `model.py` is the encoder and the pre layer. Of Qwen-VL
(2023): `first_generation.py` is the encoder, `tokenizer.py` has the tokens around pictures and boxes. Of both: `weights.py`
has the checkpoints' names, `chat.py` has conversations.
"""
