"""Tests of app/domain."""
