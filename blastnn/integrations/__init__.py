"""Thin connections to other libraries; they read the saved specs."""
