"""The images leaf: content by digest, names, snapshots, leases."""
