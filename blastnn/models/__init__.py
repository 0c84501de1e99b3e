"""Where dense models come from and how their blocks are walked; knows nothing of structures."""
