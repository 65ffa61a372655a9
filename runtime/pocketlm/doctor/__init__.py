"""What this machine, this installation and this cache are like, and what to do where something is wrong.

    examine.py       all checks, one after the other
    check.py         what a check says, and all of them together
    hardware.py      processor, threads, memory and how fast it is read
    energy.py        which source of joules there is, and why not the others
    installation.py  versions, extras, the cache folder and its bundles
    privacy.py       telemetry, the Hub's settings, proxies
    self_test.py     a model answers in a process that cannot use the network

Nothing here is fetched, changed or repaired. This file imports nothing, so that the self-test's process
can lock the network first.
"""
