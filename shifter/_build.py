"""What a build knows about itself. These are a checkout's values; `make` installs a file of its own in this place."""

VERSION = "0.1.0"
BUILD = "0.1.0-checkout"
PREFIX = "/opt/shifter"
LIBEXEC = "/opt/shifter/libexec/shifter/python"
CONF = "/etc/shifter/udiRoot.conf"
PYTHON = "/usr/bin/python3"
