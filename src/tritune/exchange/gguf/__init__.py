"""llama.cpp's files: a merged model, or a LoRA that llama.cpp puts onto its base when it loads.

`model.py` and `lora.py` are the two formats, `names.py` what their tensors are called.
"""
