"""The whole test suite: real PostgreSQL, real Valkey, no network but loopback."""
