"""Archives that hold images: docker-archive, OCI layout, plain root file system."""
