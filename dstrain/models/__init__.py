"""Single-device networks whose parameter names are those of diffusers."""
