"""Tables (`job`) and the HTTP contract (`schemas`), strangers to each other."""
