"""LLaVA for Light: CLIP's vision tower and a projector in front of a text model that another plugin serves.

`hooks.py` answers the contract's hooks and wraps those of the text model; `config.py` reads both layouts of
configurations, `images.py` cuts pictures to what the tower sees, `model.py` is the encoder, `weights.py` the
checkpoints' names, `tower.py` finds the tower of the original layout, `chat.py` has the conversations.
"""
