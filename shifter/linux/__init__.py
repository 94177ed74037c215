"""Thin layer over the Linux system calls that the builder needs; no policy lives here."""
