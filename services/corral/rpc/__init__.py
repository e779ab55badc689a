"""What every gRPC service shares: addresses, errors, call context, hosting and client channels."""
