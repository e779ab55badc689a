"""The network leaf: networks with their addresses, endpoints with their namespaces, and our one nftables table."""
