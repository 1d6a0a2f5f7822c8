"""Engines on several machines: replicas under Ray Serve, and an engine of ours that passes requests on to them.

replica.py   what runs on the machines: one engine each, embedded or vLLM's
engine.py    our interface of engines; a request goes to a replica that has its adapter in memory, if one has
"""
