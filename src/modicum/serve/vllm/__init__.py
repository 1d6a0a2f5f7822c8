"""The adapters of a store inside vLLM: a plug-in of vLLM's, and an engine of ours in front of it.

    seams.py     what of vLLM is built upon, compared with the vLLM that is installed
    layers.py    LoRA-XS cores in vLLM's LoRA layers: the directions once, a core for each slot
    library.py   records of a store, checked against the base model, in the form that vLLM loads
    plugin.py    puts them into vLLM; the entry point `vllm.general_plugins`
    resolver.py  `ada@3` in vLLM's own server → the adapter in the store, a bounded number of them at a time
    engine.py    our interface of engines, with vLLM behind it

vLLM has an environment of its own: its pins and ours of Transformers exclude each other. docs/do/scale-out.md says how.
"""
