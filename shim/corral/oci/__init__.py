"""The OCI runtime core: typed config.json, and create, start and exec of containers."""
