"""The fuzzer of the door's parsing."""
