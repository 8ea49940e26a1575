"""The verbs of the service: on rows, on the provider, on stored files."""
