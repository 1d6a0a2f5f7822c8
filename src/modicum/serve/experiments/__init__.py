"""Experiments: traffic between versions, what users thought of it, and when to stop.

experiments.py  Experiments: what routes and names call, and the thread that ends experiments
lifecycle.py    draft → running → stopped → promoted → rolled back, each told to the store's log
design.py       what an experiment is
assignment.py   user → arm
trial.py        one answer: timed, written down, compared with its shadow
feedback.py     what users say
sequential.py   intervals that hold however often one looks
guardrails.py   when an arm is stopped
report.py       what was found
tables.py, ledger.py   the file all of it is kept in
"""

from modicum.serve.experiments.experiments import Experiments, Route

__all__ = ["Experiments", "Route"]
