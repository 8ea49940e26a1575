"""Generic plumbing: knows PostgreSQL, Celery and logging, and has never heard of a job."""
