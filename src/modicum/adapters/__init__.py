"""The contract of a method, and everything a method need not know.

`contract` what a method is · `config` the options all methods share · `registry` which methods exist ·
`layer` and `host` the PEFT tuner that hosts them · `basis` frozen directions shared by adapters ·
`mixed` batches of several adapters · `check` refusing the wrong base, basis or numbers.
"""
