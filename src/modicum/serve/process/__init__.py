"""The engine in a process of its own, so that HTTP and generation do not share one interpreter's lock.

engine.py    our interface of engines, in the process that asks
spawned.py   the process from its start to its end
child.py     what runs in it
wire.py      what the two say to each other
"""
