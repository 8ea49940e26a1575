"""Pure knowledge about jobs and generations: imports nothing but the standard library."""
