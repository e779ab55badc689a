"""CNI: networks that plugins make. Source: CNI specification 1.1, containernetworking/cni SPEC.md."""
