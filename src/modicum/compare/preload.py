"""What every process of a comparison needs, imported once by the server that the processes are forked from."""

import gc

import peft  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import modicum.compare.run
import modicum.train.trainer  # noqa: F401

# a collection in a forked process would look at all of this, and copy every page it lies on
gc.collect()
gc.freeze()
