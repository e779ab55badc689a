"""Registries: images fetched from them and brought to them.

Source: OCI distribution-spec 1.1; docker registry HTTP API V2 and its token authentication.
"""
