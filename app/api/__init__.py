"""The doors for HTTP: validate, one transaction, ring, answer."""
