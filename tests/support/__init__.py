"""What the tests share: requirements, a daemon of one's own, an image, and the search for leaks."""
