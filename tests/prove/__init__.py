"""The fault generator: `python -m tests.prove`.

    plan      what will go wrong and when: a pure function of the seed
    system    the processes, and the wires between them that can be cut
    faults    making it go wrong, and healing it
    clients   callers who submit, watch, cancel, retry and delete meanwhile
    evidence  what is there in the end: rows, files, and what the provider sold
    checks    the laws, each a function from evidence to what is wrong with it
    report    the telling of it

What is proved: no job that was accepted is lost, none is stuck, nothing is bought twice,
no status goes backwards, whatever dies in between.
"""
