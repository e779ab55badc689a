"""The command `corral`: one noun per file, each loaded only when one of its verbs runs."""
