"""One module per vendor, and the guarded way to their files: nothing else knows a vendor."""
