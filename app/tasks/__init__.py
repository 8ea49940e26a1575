"""The Celery door: tasks hand job ids to the engine and return."""
