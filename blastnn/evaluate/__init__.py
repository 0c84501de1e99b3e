"""How we know that it worked; knows only a callable model and a tokenizer."""
