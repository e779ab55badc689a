"""Keys of the gRPC metadata that goes along with every call."""

NAMESPACE_KEY = "corral-namespace"
REQUEST_ID_KEY = "corral-request-id"
