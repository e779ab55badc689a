"""The OCI runtime core: typed config.json, and create, start and exec of containers."""

OCI_VERSION = "1.3.0"
"""The version of the specification that is spoken here; of config.json, every version 1 is understood."""
