"""The commands that people type. Never privileged on behalf of somebody else, and never on the launch path."""
