"""Shifter in Python: user defined images on HPC clusters."""
