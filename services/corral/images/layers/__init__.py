"""From a layer's tar to a directory tree, in worker processes: standard library, zstandard and corral.kernel only."""
